"""One ``.pt`` file, read without running anything that it names.

[Note: .pt] ``torch.save`` writes a zip archive whose members are not compressed: a pickle, and a member with the bytes
of each storage. What the pickle names is never imported. Tensors come out as `Stored`, which says where the bytes are;
``torch.Size``, dtypes and the plain containers as they are; objects of any other class as an `Opaque`, which keeps what
it would have been made from and does nothing.
"""

from __future__ import annotations

import codecs
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

from ds_fragment.errors import CheckpointError

_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": set,
    "frozenset": frozenset,
    "complex": complex,
    "bytearray": lambda data=b"", *rest: bytearray(_encoded(data)),  # never of a number, which is a size
}
# ``float32``, say: a table, because names come from the file.
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_DTYPES |= {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Untyped": torch.uint8,
    }.items()
}
_LOCAL_HEADER = 30  # bytes before the name of a zip member


def _encoded(text: Any) -> bytes:
    return codecs.latin_1_encode(text)[0] if isinstance(text, str) else memoryview(text).tobytes()


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its first element is, and how the others follow."""

    path: str
    offset: int  # bytes
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last, those between them that are not the tensor's included."""
        if self.shape.numel() == 0:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in the file in order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return self.shape.numel() == 0
            step *= size
        return True


def is_scalar(value: Any) -> TypeGuard[float | Stored]:
    """Whether it is a number, or a stored tensor without dimensions."""
    return isinstance(value, (int, float)) or (isinstance(value, Stored) and len(value.shape) == 0)


def number(value: Any) -> float:
    """A number, or the one in a stored tensor of one element."""
    if not isinstance(value, Stored):
        return float(value)
    with open(value.path, "rb") as file:
        file.seek(value.offset)
        raw = bytearray(file.read(value.dtype.itemsize))
    return float(torch.frombuffer(raw, dtype=value.dtype).item())


class Opaque:
    """An object of a class that is not read: what it was made from, and its state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **named: Any) -> Opaque:
        """Never fails."""
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: Any) -> None:
        """What a pickle does to a list."""

    def extend(self, items: Any) -> None:
        """What a pickle does to a list."""

    def add(self, item: Any) -> None:
        """What a pickle does to a set."""


def read_pt(path: Path) -> Any:
    """What ``torch.save`` was given, with `Stored` in the place of tensors.

    Raises:
        CheckpointError: the file is missing, damaged, cut short or of another format; it is named.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size == 0:
                raise CheckpointError(f"'{path}' is empty (0 bytes): it was not written to its end")
            if not zipfile.is_zipfile(file):
                raise CheckpointError(f"'{path}' {_what(file)} ({size} bytes)")
            with zipfile.ZipFile(file) as archive:
                return _Archive(path, file, size, archive).load()
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is missing") from None
    except Exception as error:
        raise CheckpointError(f"'{path}' is damaged: {type(error).__name__}: {error}") from error


def _what(file: BinaryIO) -> str:
    file.seek(0)
    begin = file.read(4)
    if begin == b"PK\x03\x04":
        return "is cut short: the end of the archive is missing, so it was not written or copied to its end"
    if begin[:1] == b"\x80":
        return "has the format of torch before 1.6: load it with torch.load and save it again with torch.save"
    return "is not a file of torch.save"


@dataclass(frozen=True)
class _Storage:
    offset: int
    nbytes: int
    dtype: torch.dtype


class _Archive:
    """The members of a file, and the pickle among them."""

    def __init__(self, path: Path, file: BinaryIO, size: int, archive: zipfile.ZipFile) -> None:
        self._path, self._file, self._size, self._archive = path, file, size, archive
        self._members = {info.filename: info for info in archive.infolist()}
        found = [name for name in self._members if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise CheckpointError(f"'{path}' is a zip archive, but not one of torch.save: it has no data.pkl")
        self._prefix = found[0].removesuffix("data.pkl")

    def load(self) -> Any:
        order = self._prefix + "byteorder"
        if order in self._members and self._archive.read(order) != b"little":
            raise CheckpointError(f"'{self._path}' was written on a big-endian machine, which is not supported")
        blob = self._archive.read(self._prefix + "data.pkl")  # its checksum is compared
        return _Unpickler(BytesIO(blob), self._tensor, self._storage).load()

    def _storage(self, kind: Any, key: Any, numel: Any) -> _Storage:
        info = self._members.get(f"{self._prefix}data/{key}")
        dtype = kind
        if info is None or not isinstance(dtype, torch.dtype):
            raise ValueError(f"storage {key} is missing, or its elements have no known dtype")
        self._file.seek(info.header_offset)
        local = self._file.read(_LOCAL_HEADER)
        if local[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key} is not where the archive says")
        begin = info.header_offset + _LOCAL_HEADER + int.from_bytes(local[26:28], "little")
        begin += int.from_bytes(local[28:30], "little")
        if begin + info.file_size > self._size or numel * dtype.itemsize > info.file_size:
            raise ValueError(f"storage {key} of {numel} elements of {dtype} does not fit into the file")
        return _Storage(begin, info.file_size, dtype)

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> Stored:
        if not isinstance(storage, _Storage):
            raise ValueError(f"a tensor of {type(storage).__name__}")
        dtype = dtype or storage.dtype
        begin = offset * dtype.itemsize
        tensor = Stored(str(self._path), storage.offset + begin, dtype, torch.Size(shape), tuple(stride))
        negative = offset < 0 or any(number < 0 for number in (*tensor.shape, *tensor.stride))
        if negative or begin + tensor.extent * dtype.itemsize > storage.nbytes:
            raise ValueError(f"a tensor of shape {tuple(shape)} lies outside of its storage of {storage.nbytes} bytes")
        return tensor


class _Unpickler(pickle.Unpickler):
    """The standard library's, with all that it could call replaced."""

    def __init__(self, file: BytesIO, tensor: Callable[..., Stored], storage: Callable[..., _Storage]) -> None:
        super().__init__(file)
        self._storage = storage
        self._opaque: dict[str, type[Opaque]] = {}
        self._rebuild: dict[str, Callable[..., Any]] = {
            "_rebuild_tensor": lambda data, offset, shape, stride, *rest: tensor(data, offset, shape, stride),
            "_rebuild_tensor_v2": lambda data, offset, shape, stride, *rest: tensor(data, offset, shape, stride),
            "_rebuild_tensor_v3": lambda data, offset, shape, stride, grad, hooks, dtype, *rest: tensor(
                data, offset, shape, stride, dtype
            ),
            "_rebuild_parameter": lambda data, *rest: data,
            "_rebuild_parameter_with_state": lambda data, *rest: data,
        }

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ``("storage", its class, key, device, numel)``."""
        _, kind, key, _, numel = pid
        return self._storage(kind, key, numel)

    def find_class(self, module: str, name: str) -> Any:
        """What stands in for a name of the pickle; nothing is imported."""
        if module == "torch._utils" and name in self._rebuild:
            return self._rebuild[name]
        if module == "torch._tensor" and name == "_rebuild_from_type_v2":
            return self._from_type
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return _BUILTINS[name]
        if module == "_codecs" and name == "encode":
            return lambda text, encoding="latin1": _encoded(text)  # how bytes are pickled
        if module in ("torch", "torch.storage") and (name in _DTYPES or name == "Size"):
            return _DTYPES.get(name, torch.Size)
        full = f"{module}.{name}"
        return self._opaque.setdefault(full, type(full, (Opaque,), {}))

    def _from_type(self, function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
        """A tensor with attributes, or of a subclass."""
        return function(*args) if function in self._rebuild.values() else Opaque(function, args)

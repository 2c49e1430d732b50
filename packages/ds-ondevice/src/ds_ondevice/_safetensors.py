"""Safetensors files: which ones a path means, what they hold, and how a part of a tensor is read out of them."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

Span = tuple[int, int]  # from, to: indices of one dimension
Region = tuple[tuple[Span, ...], ...]  # for each dimension the spans that are wanted, one behind the other

# What the format calls torch's dtypes. Some came after torch 2.6.
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_DTYPES = {name: getattr(torch, attribute) for name, attribute in _NAMES.items() if hasattr(torch, attribute)}

_BLOCK = 64 << 20  # bytes; no more of a file than this is mapped into memory and touched at once


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; ``dtype`` is None where torch has none of that ``kind``."""

    path: Path
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]


def files_of(path_or_paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The safetensors files that are meant by a file, an index, a folder, or a list of these."""
    if isinstance(path_or_paths, (str, os.PathLike)):
        return _files_of(Path(path_or_paths))
    paths = [path for one in path_or_paths for path in _files_of(Path(one))]
    if not paths:
        raise ValueError("path_or_paths is an empty list: give at least one file")
    return paths


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        usual = path / "model.safetensors.index.json"
        if len(indices) > 1 and usual not in indices:
            raise ValueError(f"'{path}' holds {len(indices)} indices: give one of {[one.name for one in indices]}")
        if indices:
            return _listed(usual if usual in indices else indices[0])
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(f"the folder '{path}' holds no .safetensors file and no index of such files")
        return found
    return _listed(path) if path.suffix == ".json" else [path]


def _listed(index: Path) -> list[Path]:
    try:
        names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.with_name(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{index}' is no index of safetensors files: {type(error).__name__}: {error}") from None


class Files:
    """Safetensors files, one of them open at a time.

    Attributes:
        tensors: what they hold, by name, in the order in which it lies in them.

    Raises:
        ImportError: the library is not installed.
        OSError: a file is not there, or damaged: its header is checked against its length.
        ValueError: two files hold a tensor of the same name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tensors: dict[str, Stored] = {}
        self._open: tuple[Path, Any] | None = None
        self._touched = 0  # bytes of the open file, since it was opened
        self._identities: dict[Path, tuple[int, ...]] = {}
        for path in paths:
            file = self._file(path)
            for name in file.offset_keys() if hasattr(file, "offset_keys") else file.keys():
                if name in self.tensors:
                    raise ValueError(f"'{name}' is in two files, '{self.tensors[name].path}' and '{path}'")
                part = file.get_slice(name)
                kind = str(part.get_dtype())
                self.tensors[name] = Stored(path, kind, _DTYPES.get(kind), tuple(part.get_shape()))
        self.close()

    def read(self, name: str, region: Region, target: torch.Tensor) -> Iterator[int]:
        """Copy the part ``region`` of a tensor to ``target``, which has the size of the part and any dtype.

        Yields:
            The bytes read after each block.
        """
        stored = self.tensors[name]
        if not stored.shape:
            target.copy_(self._file(stored.path).get_tensor(name))
            yield target.numel() * _itemsize(stored)
            return
        row = math.prod(stored.shape[1:]) * _itemsize(stored)
        for box, place in _boxes(region, rows=max(1, _BLOCK // max(1, row))):
            part = self._file(stored.path).get_slice(name)[box]
            target[place].copy_(part)
            nbytes = part.numel() * part.element_size()
            del part  # or the file stays mapped
            self._touched += (box[0].stop - box[0].start) * row
            if self._touched >= _BLOCK:
                self.close()  # gives the pages back, which count as this process's memory
            yield nbytes

    def nbytes(self, name: str, region: Region) -> int:
        """How many bytes a part of a tensor has in its file."""
        return math.prod(sum(stop - start for start, stop in spans) for spans in region) * _itemsize(self.tensors[name])

    def _file(self, path: Path) -> Any:
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        self.close()
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise ImportError("load_into reads safetensors: pip install ds-ondevice[safetensors]") from None
        try:
            status = path.stat()
            file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file '{path}'") from None
        except SafetensorError as error:
            raise OSError(f"'{path}' is no safetensors file, or not all of one: {error}") from None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._identities.setdefault(path, identity) != identity:
            raise OSError(f"'{path}' was changed while it was read")
        self._open, self._touched = (path, file), 0
        return file

    def close(self) -> None:
        """Close the open file; the next read opens it again."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _itemsize(stored: Stored) -> int:
    assert stored.dtype is not None  # the caller refused it
    return stored.dtype.itemsize


def _boxes(region: Region, *, rows: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The boxes of a region, none of more than ``rows`` rows: where each lies in the whole, and where in the part."""
    dims = [_placed(spans, rows if dim == 0 else None) for dim, spans in enumerate(region)]
    for pieces in itertools.product(*dims):
        yield tuple(whole for whole, _ in pieces), tuple(part for _, part in pieces)


def _placed(spans: tuple[Span, ...], rows: int | None) -> list[tuple[slice, slice]]:
    placed, at = [], 0
    for start, stop in spans:
        step = rows or max(1, stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            placed.append((slice(first, last), slice(at, at + last - first)))
            at += last - first
    return placed

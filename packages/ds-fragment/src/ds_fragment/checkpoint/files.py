"""Safetensors files as they are found: one file, several under an index, or a folder that has either.

[Note: format] Eight bytes with the length of a JSON header (little-endian), the header (for each tensor its dtype,
shape and place), then the tensors' bytes one after the other. Source: the safetensors README. Reading goes through the
library. Writing does not: the library writes a file from tensors that are all in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ds_fragment.errors import CheckpointError, InvalidValueError
from ds_fragment.layout import Fragment

# What torch calls the dtypes of the format; an older torch lacks some.
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in _NAMES.items() if hasattr(torch, dtype)
}
_WRITTEN = {dtype: name for name, dtype in _DTYPES.items()}

# What libraries call the weights in a folder, the first that is there counts.
_IN_FOLDERS = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")

_INDEX = ".index.json"
_RESERVED = {"format", "tied", "optimizer", "param_groups", "total_size"}

# A function that is called with bytes done and bytes in all; True for a bar, or log lines.
Progress = Callable[[int, int], None] | bool | None

_log = logging.getLogger("ds.fragment")


def header(tensors: Sequence[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file: the header's length and the header, padded so that the tensors begin aligned."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, dtype, shape in tensors:
        require_dtype(name, dtype)
        end = position + shape.numel() * dtype.itemsize
        table[name] = {"dtype": _WRITTEN[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    blob = json.dumps(table, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    return len(blob).to_bytes(8, "little") + blob


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise unless the format has the dtype of a tensor, and its name.

    Raises:
        CheckpointError: it has not.
    """
    if dtype not in _WRITTEN:
        raise CheckpointError(f"'{name}' has dtype {dtype}, which safetensors cannot hold: pass another dtype")
    if name == "__metadata__":
        raise CheckpointError(f"'{name}' is the name of a tensor, which safetensors has for something else: rename it")


def require_metadata(metadata: Mapping[str, str]) -> None:
    """Raise unless a file can have these entries beside those that a save adds itself.

    Raises:
        InvalidValueError: one is no string, or has a name of its own meaning.
    """
    if not isinstance(metadata, Mapping):
        raise InvalidValueError(f"metadata is a {type(metadata).__name__}, expected a mapping of strings")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidValueError(f"metadata has {key!r}: {value!r}, expected strings: pass json.dumps(value)")
        if key in _RESERVED:
            raise InvalidValueError(f"metadata has '{key}', which a save sets itself: pass another name")


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path that a user gave.

    Raises:
        TypeError: it is none.
    """
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"path is a {type(path).__name__}, expected a path of a file") from None


def index_path(target: Path) -> Path:
    """Where the index of a sharded file is."""
    return target.with_name(f"{target.name}{_INDEX}")


def shards_of(target: Path) -> list[Path]:
    """The files that an index names, of those that are in its folder; none without an index that can be read."""
    with contextlib.suppress(OSError, CheckpointError):
        _, weights = _read_index(index_path(target))
        return [target.with_name(name) for name in dict.fromkeys(weights.values())]
    return []


def require(paths: Sequence[Path], fix: str) -> None:
    """Raise unless all of the files are there.

    Raises:
        CheckpointError: some are not.
    """
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise CheckpointError(f"{len(absent)} of {len(paths)} files are not there, such as '{absent[0]}': {fix}")


def find(path: Path) -> Path:
    """The file, or the index, that a path means: see `load_full`.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return path
    if index_path(path).exists():
        return index_path(path)
    raise CheckpointError(f"path is '{path}', but there is neither that file nor an index of its parts")


def _in_folder(folder: Path) -> Path:
    if (folder / "snapshots").is_dir():  # as Hugging Face caches a repository
        snapshots = sorted((folder / "snapshots").iterdir())
        main = folder / "refs" / "main"
        if main.exists():
            snapshots = [folder / "snapshots" / main.read_text().strip()]
        if len(snapshots) == 1 and snapshots[0].is_dir():
            return _in_folder(snapshots[0])
        raise CheckpointError(f"path is '{folder}', which has {len(snapshots)} snapshots: name the folder of one")
    for name in _IN_FOLDERS:
        for path in (folder / name, index_path(folder / name)):
            if path.exists():
                return path
    names = sorted(path.name for path in folder.iterdir())
    indexes = [name for name in names if name.endswith(f".safetensors{_INDEX}")]
    parts = {part.name for name in indexes for part in shards_of(folder / name.removesuffix(_INDEX))}
    singles = [name for name in names if name.endswith(".safetensors") and name not in parts]
    found = [*singles, *indexes]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise CheckpointError(f"path is '{folder}', a folder with {len(found)} models: name one of {', '.join(found)}")
    raise CheckpointError(f"path is '{folder}', a folder without safetensors files: {_what_else(names)}")


def _what_else(names: Sequence[str]) -> str:
    """What to do with a folder of other files."""
    if "latest" in names or any(name.startswith(("zero_pp_rank", "bf16_zero_pp_rank")) for name in names):
        return "it looks like a DeepSpeed checkpoint; ds_fragment.zero_checkpoint.consolidate makes one file of it"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return "it looks like a checkpoint of torch.distributed.checkpoint; load it with that"
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return f"it has {pickled[0]}, a pickle; load it with torch.load(weights_only=True)"
    return f"it has {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}"


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of an index, and by name of tensor the name of a file in the same folder.

    Raises:
        CheckpointError: it is no index, or it names files elsewhere.
    """
    try:
        found = json.loads(path.read_bytes())
        metadata, weights = found.get("metadata") or {}, dict(found["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is no index of safetensors files: {type(error).__name__}: {error}") from error
    for name, file in weights.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"'{path}' says that '{name}' is in {file!r}, expected a file beside the index")
    return metadata, weights


@dataclass(frozen=True)
class Made:
    """A tensor that is computed from those of a file whenever it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class Reader:
    """The tensors of one file, or of several under an index, read in parts.

    Args:
        path: see `load_full`.

    Attributes:
        path: the file, or the index.
        paths: the files.
        shapes: by name.
        dtypes: by name.
        file_of: by name, the file that has it.
        metadata: strings of the header, and of the index where there is one.

    Raises:
        ImportError: the safetensors library is not installed.
        CheckpointError: there is no such file, or one is damaged or missing; the message names it.
    """

    def __init__(self, path: Path) -> None:
        try:
            import safetensors
        except ImportError:
            raise ImportError(
                "reading a safetensors file needs the library: pip install ds-fragment[safetensors]"
            ) from None
        self._open: Any = safetensors.safe_open
        self._broken: Any = (safetensors.SafetensorError, OSError)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._made: dict[str, Made] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.file_of: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self.path, weights = find(path), dict[str, str]()
        self.paths = [self.path]
        if self.path.name.endswith(_INDEX):
            metadata, weights = _read_index(self.path)
            self.metadata = {key: value for key, value in metadata.items() if isinstance(value, str)}
            self.paths = [self.path.with_name(name) for name in dict.fromkeys(weights.values())]
            require(self.paths, f"'{self.path.name}' names them")
        with self._stack as stack:
            for file in self.paths:
                self._read_header(file)
            self._check_index(weights)
            self._stack = stack.pop_all()

    def _read_header(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(self._open(path, framework="pt"))
            self.metadata = {**(file.metadata() or {}), **self.metadata}
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name in self._files:
                    raise CheckpointError(f"'{name}' is in both '{self.file_of[name]}' and '{path}'")
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(f"'{name}' in '{path}' has dtype {part.get_dtype()}, unknown to this torch")
                self._files[name], self.file_of[name] = file, path
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
        except self._broken as error:
            raise CheckpointError(f"'{path}' is no complete safetensors file: {error}") from error

    def _check_index(self, weights: Mapping[str, str]) -> None:
        for name, file in weights.items():
            if name not in self.file_of or self.file_of[name].name != file:
                raise CheckpointError(f"'{self.path}' says that '{name}' is in '{file}', which does not have it")

    def json(self, key: str, kind: type) -> Any:
        """An entry of the metadata that is JSON, a list or a dict; an empty one where there is none.

        Raises:
            CheckpointError: it is something else.
        """
        text = self.metadata.get(key)
        try:
            found = kind() if text is None else json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, kind):
            raise CheckpointError(
                f"the metadata of '{self.path}' has '{key}' = {text!r}, expected a JSON {kind.__name__}"
            )
        return found

    def sums(self) -> list[int]:
        """A number for each file, equal where the ranks see the same one: its size, its header, its last bytes."""
        sums = []
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                crc = zlib.crc32(file.read(length))
                file.seek(max(0, size - 4096))
                sums.append(hash((size, zlib.crc32(file.read(), crc))))
        return sums

    def replace(self, names: Collection[str], made: Mapping[str, Made]) -> None:
        """Have no longer the tensors of these names, of which others are made, but those."""
        for name in names:
            del self.shapes[name], self.dtypes[name]
        for name, tensor in made.items():
            self._made[name], self.shapes[name], self.dtypes[name] = tensor, tensor.shape, tensor.dtype

    def _slice(self, name: str) -> Any:
        """What gives parts of a tensor."""
        return self._made[name].make() if name in self._made else self._files[name].get_slice(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        found: torch.Tensor = self._made[name].make() if name in self._made else self._files[name].get_tensor(name)
        return found

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some of the first dimension of a tensor; no more is read. A tensor without dimensions is read whole."""
        if not self.shapes[name]:
            return self.tensor(name)
        found: torch.Tensor = self._slice(name)[start:stop]
        return found

    def fragment(self, name: str, shape: tuple[int, ...], fragment: Fragment) -> torch.Tensor:
        """One fragment of a tensor, of the fragment's size; no more than the rows that it touches are read."""
        stored = self.shapes[name]
        if not stored:
            return self.tensor(name).view(fragment.size)
        if len(shape) == len(stored):
            box = tuple(slice(o, o + s) for o, s in zip(fragment.offset, fragment.size, strict=True))
            found: torch.Tensor = self._slice(name)[box]
            return found
        # The layout is over the flattened tensor: read the rows that the interval touches.
        (start,), (numel,) = fragment.offset, fragment.size
        row = torch.Size(stored[1:]).numel()
        first = start // row
        rows = self.rows(name, first, -(-(start + numel) // row))
        return rows.reshape(-1).narrow(0, start - first * row, numel)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@contextlib.contextmanager
def reporter(progress: Progress, name: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with bytes done and bytes in all: the caller's own, a bar, log lines, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    try:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        yield _LogLines(name)
        return
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _LogLines:
    """A line in the log for every tenth."""

    def __init__(self, name: str) -> None:
        self._name, self._tenths = name, 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // total if total else 10
        if tenths > self._tenths:
            self._tenths = tenths
            _log.info("%s: %d of %d MB", self._name, done >> 20, total >> 20)

"""The safetensors format and library, as far as `_checkpoint` needs them, and a progress report."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from ds_fragment.layout import Fragment

# The names of the format, and what torch calls them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

_log = logging.getLogger("ds.fragment")


def header(tensors: Sequence[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file: the header's length and the header, padded so that the tensors begin aligned."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, dtype, shape in tensors:
        if dtype not in _DTYPES:
            raise OSError(f"'{name}' has dtype {dtype}, which safetensors cannot hold: pass another dtype")
        end = position + shape.numel() * dtype.itemsize
        table[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    blob = json.dumps(table, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    return len(blob).to_bytes(8, "little") + blob


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """The bytes of a contiguous CPU tensor."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes:
        file.write((ctypes.c_char * nbytes).from_address(tensor.data_ptr()))


def index_path(target: Path) -> Path:
    """Where the index of a sharded file is."""
    return target.with_name(f"{target.name}.index.json")


def shards_of(target: Path) -> list[Path]:
    """The files that an index names; none without an index."""
    index = index_path(target)
    if not index.exists():
        return []
    names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
    return [target.with_name(name) for name in names]


class Reader:
    """The tensors of one file or of a sharded one, read in parts."""

    def __init__(self, target: Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError(
                "reading a safetensors file needs the library: pip install ds-fragment[safetensors]"
            ) from None
        paths = [target] if target.exists() else shards_of(target)
        if not paths:
            raise FileNotFoundError(f"path is '{target}', but there is neither that file nor an index of its parts")
        self._paths = paths
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118  (not a dict)
                self._files[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def sums(self) -> list[int]:
        """A number for each file, equal where the ranks see the same one: its size, its header, its last bytes."""
        sums = []
        for path in self._paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                crc = zlib.crc32(file.read(length))
                file.seek(max(0, size - 4096))
                sums.append(hash((size, zlib.crc32(file.read(), crc))))
        return sums

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def fragment(self, name: str, shape: tuple[int, ...], fragment: Fragment) -> torch.Tensor:
        """One fragment of a tensor, of the fragment's size; no more than the rows that it touches are read."""
        stored = self.shapes[name]
        if not stored:
            return self.tensor(name).view(fragment.size)
        part = self._files[name].get_slice(name)
        if len(shape) == len(stored):
            box = tuple(slice(o, o + s) for o, s in zip(fragment.offset, fragment.size, strict=True))
            found: torch.Tensor = part[box]
            return found
        # The layout is over the flattened tensor: read the rows that the interval touches.
        (start,), (numel,) = fragment.offset, fragment.size
        row = torch.Size(stored[1:]).numel()
        first = start // row
        rows: torch.Tensor = part[first : -(-(start + numel) // row)]
        return rows.reshape(-1).narrow(0, start - first * row, numel)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@contextlib.contextmanager
def reporter(progress: Callable[[int, int], None] | bool, name: str) -> Iterator[Callable[[int, int], None]]:
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

"""The tensors of a checkpoint, read piece by piece: nothing of a file is in memory but the tensor that is read."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from io import FileIO
from types import TracebackType

import torch

from ds_fragment.errors import CheckpointError
from ds_fragment.zero_checkpoint.sources import Source

try:
    import resource

    _OPEN = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)  # files at once
except ImportError:  # Windows
    _OPEN = 64


class Reader:
    """Reads sources; keeps files open between them.

    Args:
        reuse: let each tensor lie where the one before it was, which is then lost.
    """

    def __init__(self, *, reuse: bool = False) -> None:
        self._reuse = reuse
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def read(self, source: Source) -> torch.Tensor:
        """The tensor, of the source's shape and dtype.

        Raises:
            CheckpointError: a file ends early, or cannot be read; it is named.
        """
        first = source.pieces[0].stored if source.pieces else None
        if first is not None and not first.is_contiguous:
            flat = self._empty(first.extent, source.dtype)
            self._fill(flat, 0, first.extent, first.path, first.offset)
            return flat.as_strided(first.shape, first.stride)
        flat = self._empty(source.shape.numel(), source.dtype)
        begin = 0
        for piece in source.pieces:
            place = piece.stored.offset + piece.start * source.dtype.itemsize
            self._fill(flat, begin, piece.numel, piece.stored.path, place)
            begin += piece.numel
        assert begin == flat.numel(), source
        return flat.view(source.shape)

    def _empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        if not self._reuse:
            return torch.empty(numel, dtype=dtype)
        nbytes = numel * dtype.itemsize
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # release the smaller one first
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype)

    def _fill(self, flat: torch.Tensor, begin: int, numel: int, path: str, offset: int) -> None:
        size = flat.dtype.itemsize
        if not numel:
            return
        memory = memoryview((ctypes.c_char * (numel * size)).from_address(flat.data_ptr() + begin * size)).cast("B")
        try:
            file = self._open(path)
            file.seek(offset)
            while memory:
                count = file.readinto(memory)
                if not count:
                    raise CheckpointError(f"'{path}' ends before byte {offset + numel * size}: it is cut short")
                memory = memory[count:]
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error}") from error

    def _open(self, path: str) -> FileIO:
        if path not in self._files:
            if len(self._files) >= _OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[path] = FileIO(path)
        self._files.move_to_end(path)
        return self._files[path]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

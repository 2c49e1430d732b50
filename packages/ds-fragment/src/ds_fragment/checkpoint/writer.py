"""The files of one save: written under temporary names, by one process or several, and made current by one rename.

[Note: files] A save that fits into one file is ``model.safetensors``. A larger one is
``model-TOKEN-00001-of-00003.safetensors`` and so on, and ``model.safetensors.index.json`` says what is where, as
Hugging Face's loaders expect. The token is new for every save, so that its files never overwrite those that are
current. Where there is both a single file and an index, the single file counts. So what makes a save current is one
operation: the rename of the single file, the rename of the index, or the removal of the single file that was there.
Optimizer state is in safetensors files of its own beside it, ``model-TOKEN.optimizer``, which the metadata of the first
names: they become current together. Their names end otherwise because inference engines load every ``*.safetensors`` of
a folder.

[Note: left behind] A save holds a lock on ``.model.safetensors.TOKEN.lock`` while its process lives. The next save
removes what other saves of the same name left: temporaries without such a lock, and files that are not current.
Nobody else changes names in the folder meanwhile: saves lock the folder for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ds_fragment.checkpoint import disk, files

MAX_SHARD_BYTES = 5 << 30
OPTIMIZER = ".optimizer"  # what ends the name of a safetensors file with optimizer state


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def to_json(self) -> list[Any]:
        """What ranks tell each other of it."""
        return [self.name, str(self.dtype).removeprefix("torch."), list(self.shape)]

    @classmethod
    def from_json(cls, told: Sequence[Any]) -> Entry:
        """What `to_json` made."""
        name, dtype, shape = told
        return cls(name, getattr(torch, dtype), torch.Size(shape))


class Writer:
    """The files of one save; see [Note: files].

    Every process that writes a part of the save makes one with the same arguments. One of them calls `begin` and, once
    all have called `close`, `commit`. Whatever happens, each calls `abandon` in the end.

    Args:
        target: what the single file is called, ``NAME.safetensors`` or an `optimizer_target`; its folder exists.
        entries: all tensors, in the order of the files.
        metadata: strings for the header of every file, and for the index.
        max_shard_bytes: of the largest file, unless one tensor is larger.
        token: eight hexadecimal digits of this save.
        cuts: positions in ``entries`` at which a file begins whatever its size.
        beside: the writer of the optimizer state that belongs to this save.

    Attributes:
        shards: the positions of the entries of each file.
        total: bytes of all tensors.
        written: bytes that this process has written.

    Raises:
        CheckpointError: safetensors cannot hold a dtype.
    """

    def __init__(
        self,
        target: Path,
        entries: Sequence[Entry],
        metadata: Mapping[str, str],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        token: str,
        cuts: Collection[int] = (),
        beside: Writer | None = None,
    ) -> None:
        self.target, self.entries, self.beside = target, entries, beside
        self._metadata = {**metadata, **({} if beside is None else {"optimizer": beside.target.name})}
        self.shards = _cut(entries, max_shard_bytes, cuts)
        self.total = sum(entry.nbytes for entry in entries)
        self.written = 0
        self._token, count = token, len(self.shards)
        stem = f"{target.stem.removesuffix(f'-{token}')}-{token}"
        numbered = [f"{stem}-{i + 1:05d}-of-{count:05d}{target.suffix}" for i in range(count)]
        self._names = [target.name] if count == 1 else numbered
        self._begins = {span.start: shard for shard, span in enumerate(self.shards)}
        self._file: BinaryIO | None = None
        self._temporaries: list[Path] = []  # that this process made
        self._lock = self._hidden(target.name, "lock")
        self._held: int | None = None

    def _hidden(self, name: str, ending: str) -> Path:
        return self.target.with_name(f".{name}.{self._token}.{ending}")

    def begin(self) -> None:
        """Say that this save is under way: see [Note: left behind]. The process that commits calls it first."""
        with disk.locked(self.target.parent):
            self._held = disk.hold(self._lock)

    def write(self, position: int, tensor: torch.Tensor) -> None:
        """Write the tensor of an entry, of its shape, cast to its dtype.

        A process begins with the first entry of any file, and goes on in order to the end of that file.
        """
        entry = self.entries[position]
        if position in self._begins:
            self.close()
            self._open(self._begins[position])
        assert self._file is not None
        assert tensor.shape == entry.shape, (entry, tensor.shape)
        disk.write_tensor(self._file, tensor.detach().to("cpu", entry.dtype).contiguous())
        self.written += entry.nbytes

    def _open(self, shard: int) -> None:
        path = self._hidden(self._names[shard], "tmp")
        chosen = [self.entries[position] for position in self.shards[shard]]
        header = files.header([(entry.name, entry.dtype, entry.shape) for entry in chosen], self._metadata)
        self._temporaries.append(path)
        self._file = disk.create(path)
        disk.write(self._file, header)

    def close(self) -> None:
        """Have on the disk what this process has written so far, beside it as well."""
        if self.beside is not None:
            self.beside.close()
        if self._file is not None:
            file, self._file = self._file, None
            disk.close(file)

    def commit(self) -> None:
        """Make the save current, and remove what it replaces. All files are complete and closed.

        Raises:
            CheckpointError: a file of another process is not in this folder.
        """
        with disk.locked(self.target.parent):
            old = files.shards_of(self.target)
            if self.beside is not None:
                self.beside._rename()
            self._rename()
            disk.sync_folder(self.target.parent)
            kept = {*self._current(), *(() if self.beside is None else self.beside._current())}
            for path in (*(path for path in old if path.name not in kept), *_left_behind(self.target, kept)):
                disk.remove(path)

    def _rename(self) -> None:
        if not self.entries:
            self._open(0)
            self.close()
        temporaries = [self._hidden(name, "tmp") for name in self._names]
        files.require(temporaries, "every process that writes a part of one save needs to see the same folder")
        for temporary, name in zip(temporaries, self._names, strict=True):
            disk.rename(temporary, self.target.with_name(name))
        index = files.index_path(self.target)
        if len(self._names) == 1:
            disk.remove(index)
            return
        pairs = zip(self._names, self.shards, strict=True)
        weights = {self.entries[position].name: name for name, span in pairs for position in span}
        metadata = {**self._metadata, "total_size": self.total}
        temporary = self._hidden(index.name, "tmp")
        self._temporaries.append(temporary)
        file = disk.create(temporary)
        disk.write(file, json.dumps({"metadata": metadata, "weight_map": weights}, indent=1).encode())
        disk.close(file)
        disk.rename(temporary, index)
        disk.remove(self.target)

    def _current(self) -> list[str]:
        """The names of this save's files."""
        return [*self._names, *([files.index_path(self.target).name] if len(self._names) > 1 else [])]

    def abandon(self) -> None:
        """Remove what was not finished, and the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)
        if self.beside is not None:
            self.beside.abandon()
        if self._held is not None:
            disk.release(self._lock, self._held)
            self._held = None


@dataclass(frozen=True)
class Order:
    """The entries of several sets of ranks in the order of the files, each name once.

    Attributes:
        entries: of all sets.
        positions: for each set, where each of its entries is in ``entries``; None where an earlier set has the name.
        starts: for each set, where those that it writes begin.
    """

    entries: list[Entry]
    positions: list[list[int | None]]
    starts: list[int]

    @classmethod
    def of(cls, sets: Sequence[Sequence[Entry]]) -> Order:
        """The order of some sets.

        >>> weight, bias = (Entry(name, torch.float32, torch.Size((2,))) for name in ("weight", "bias"))
        >>> Order.of([[weight], [weight, bias]]).positions
        [[0], [None, 1]]
        """
        entries: list[Entry] = []
        known: set[str] = set()
        positions: list[list[int | None]] = []
        starts = []
        for each in sets:
            starts.append(len(entries))
            positions.append([])
            for entry in each:
                positions[-1].append(None if entry.name in known else len(entries))
                if entry.name not in known:
                    known.add(entry.name)
                    entries.append(entry)
        return cls(entries, positions, starts)


def _cut(entries: Sequence[Entry], max_shard_bytes: int, cuts: Collection[int]) -> list[range]:
    spans, start, filled = [], 0, 0
    for position, entry in enumerate(entries):
        if position > start and (filled + entry.nbytes > max_shard_bytes or position in cuts):
            spans.append(range(start, position))
            start, filled = position, 0
        filled += entry.nbytes
    return [*spans, range(start, len(entries))]


def _left_behind(target: Path, kept: Collection[str]) -> list[Path]:
    """Files of earlier saves of the same name, and of saves that were killed; see [Note: left behind]."""
    stem, token = re.escape(target.stem), "([0-9a-f]{8})"
    part = rf"{stem}-{token}(?:-\d{{5}}-of-\d{{5}}\.safetensors|(?:-\d{{5}}-of-\d{{5}})?\{OPTIMIZER}(?:\.index\.json)?)"
    whole = rf"{stem}\.safetensors(?:\.index\.json)?"
    left = re.compile(rf"{part}|\.(?:{part}|{whole})\.{token}\.(?:tmp|lock)")
    found = []
    for path in target.parent.iterdir():
        matched = left.fullmatch(path.name)
        if matched is not None and path.name not in kept:
            token_of_save = [group for group in matched.groups() if group][-1]
            if not disk.is_held(target.with_name(f".{target.name}.{token_of_save}.lock")):
                found.append(path)
    return found


def optimizer_target(target: Path, token: str) -> Path:
    """What the file beside a save is called that has its optimizer state."""
    return target.with_name(f"{target.stem}-{token}{OPTIMIZER}")

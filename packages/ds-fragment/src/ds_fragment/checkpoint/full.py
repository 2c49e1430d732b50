"""One consolidated safetensors file from a sharded run, and back.

[Note: file] The safetensors format: eight bytes with the length of a JSON header (little-endian), the header (for each
tensor its dtype, shape and place), then the tensors' bytes one after the other. The library writes a file from tensors
that are all in memory; here rank 0 writes each as it arrives, so that no rank ever holds more than two buckets.
Source of the format: the safetensors README. Reading goes through the library.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.checkpoint import disk, files
from ds_fragment.collective.agree import agree
from ds_fragment.collective.exchange import Locate, Shards as Found
from ds_fragment.engines.loaded import is_dtensor
from ds_fragment.engines.model import own_parameters, unwrapped
from ds_fragment.engines.shards import Shards, refresh
from ds_fragment.errors import InvalidValueError
from ds_fragment.record import clean_name

MAX_SHARD_BYTES = 5 << 30

Progress = Callable[[int, int], None]


class ShardValues(Protocol):
    """What stands in for a model's values, as a `ds_fragment.Shadow` does."""

    def locate(self, shards: Shards) -> Locate:
        """What gives this rank's pieces of the items; each has the dtype and the size that its place says.

        Raises:
            FragmentError: it does not have them.
        """


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: a parameter by its position, or a buffer."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    item: int | None
    buffer: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def save_full(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    values: ShardValues | None = None,
    dtype: torch.dtype | None = torch.float32,
    bucket_bytes: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | bool = False,
) -> None:
    """Write the whole model, parameters and persistent buffers, to one safetensors file from rank 0.

    All ranks of the default group must call it; rank 0 writes. The parameters' true values are streamed, two buckets
    at a time. The file is written under a temporary name and renamed when it is complete, so that a run killed
    half-way leaves the file that was there. Tied parameters are stored once; the metadata entry ``tied`` says under
    which names they are known (JSON, alias to name).

    Args:
        model: the sharded model, wrapped or not; names lose the prefixes of wrappers.
        path: ``model.safetensors``, say, in a folder that exists. Above ``max_shard_bytes`` there are several files
            beside it, and ``model.safetensors.index.json`` says what is where, as Hugging Face's loaders expect.
        values: a `Shadow` of the model, whose parameters are stored in the place of the model's own; not while it is
            swapped. Buffers are the model's.
        dtype: what floating-point parameters are stored as; None keeps the master's dtype. Buffers keep theirs.
        bucket_bytes: how much travels at once; see `iter_full`.
        max_shard_bytes: the largest file.
        metadata: strings to store in the header.
        progress: True for a bar (or, without rich, log lines) on rank 0, or a function called there with bytes
            written and bytes in all.

    Raises:
        InvalidValueError: the path cannot be written to, or a parameter is shared by ranks without rank 0 and has no
            replica there (experts of other expert-parallel ranks, which would be lost), or ``values`` is not of this
            model as it is sharded now; the same on every rank.
        FragmentError: a piece could not be read, or rank 0 could not write; the same on every rank.
    """
    entries, tied, shards = _entries(model, dtype, "save_full")
    target = Path(path)
    group = _everyone()
    writes = not dist.is_initialized() or dist.get_rank() == 0
    error = (_unwritable(target, max_shard_bytes) if writes else None) or _ambiguous(entries, shards)
    pieces_of: Locate = shards.pieces
    if values is not None:
        try:
            pieces_of = values.locate(shards)
        except Exception as caught:
            error = error or caught
    sums = [hash((entry.shape, entry.dtype.itemsize)) for entry in entries]
    agree(error, group, shards.device(), sums, lambda i: f"the shape or dtype of '{entries[i].name}'")
    header = {**(metadata or {}), **({"tied": json.dumps(tied)} if tied else {})}
    writer = _Writer(target, entries, header, max_shard_bytes) if writes else None
    with contextlib.ExitStack() as stack:
        if writer is not None:
            stack.callback(writer.abandon)
        report = stack.enter_context(files.reporter(progress if writes else False, target.name))
        failure: list[Exception] = []

        def locate(items: Sequence[int]) -> Found:
            if failure:
                raise failure[0]  # travels to every rank with the next bucket
            return pieces_of(items)

        try:
            dst = 0 if dist.is_initialized() else None
            for item, tensor in shards.full(range(len(shards.params)), bucket_bytes, dst, locate):
                if writer is not None and not failure:
                    try:
                        report(writer.write_item(item, tensor), writer.total)
                    except Exception as caught:  # of the file, or of the caller's ``progress``
                        failure.append(caught)
            if writer is not None and not failure:
                report(writer.write_buffers(), writer.total)
                writer.finish()
        except Exception as caught:
            failure.append(caught)
        with shards.named_if_broken(range(len(shards.params))):
            agree(failure[0] if failure else None, group, shards.device())


def load_full(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True, refresh_lp: bool = True) -> None:
    """Write a consolidated safetensors file into a sharded model. All ranks of the default group must call it.

    Each rank reads no more than its own pieces from the file, one after the other; every rank must be able to open it.
    Nothing is written before all ranks have found every tensor with the right shape. A file that cannot be read to its
    end leaves the model half loaded, and is an error on every rank.

    Args:
        model: the sharded model, wrapped or not.
        path: the file, or the name under which a sharded one was saved.
        strict: whether names that only the file or only the model has are an error.
        refresh_lp: bring the low-precision weights up to date at once.

    Raises:
        InvalidValueError: the file does not fit the model; on every rank, and nothing is written.
        ImportError: safetensors is not installed: ``pip install ds-fragment[safetensors]``.
    """
    entries, tied, shards = _entries(model, None, "load_full")
    group, device = _everyone(), shards.device()
    error = _ambiguous(entries, shards)
    sums: list[int] = []
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(files.Reader(Path(path)))
            sums = reader.sums()
            _match(entries, tied, reader, strict)
            shards.pieces(range(len(shards.params)))
        except Exception as caught:
            error = error or caught
        agree(error, group, device, sums, lambda i: f"the file '{Path(path).name}' (part {i})")
        try:
            with torch.no_grad():
                for entry in entries:
                    for target, piece in _pieces(entry, shards, reader) if entry.name in reader.shapes else ():
                        target.copy_(piece.view(target.shape))
        except Exception as caught:
            error = caught
        agree(error, group, device)
    if refresh_lp:
        refresh(shards, None)


def _everyone() -> list[dist.ProcessGroup]:
    world = dist.group.WORLD if dist.is_initialized() else None
    return [] if world is None else [world]


def _entries(model: nn.Module, dtype: torch.dtype | None, call: str) -> tuple[list[_Entry], dict[str, str], Shards]:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    params: list[torch.Tensor] = []
    names: list[str] = []
    for name, param in own_parameters(model, remove_duplicate=False):
        if id(param) in first:
            tied[name] = first[id(param)]
            continue
        first[id(param)] = name
        names.append(name)
        params.append(param)
    buffers, parameters = list(_persistent_buffers(unwrapped(model))), len(params)
    for name, buffer in buffers:
        if is_dtensor(buffer):  # `distribute_module` makes them; they travel as parameters do, in their own dtype
            names.append(name)
            params.append(buffer)
    shards = Shards(params, "value", call)
    entries = []
    for item, (name, sharding) in enumerate(zip(names, shards.shardings, strict=True)):
        stored = dtype if dtype and sharding.dtype.is_floating_point and item < parameters else sharding.dtype
        entries.append(_Entry(name, sharding.shape, stored, item, None))
    entries += [_Entry(name, each.shape, each.dtype, None, each) for name, each in buffers if not is_dtensor(each)]
    return entries, tied, shards


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield clean_name(f"{prefix}.{name}" if prefix else name), buffer


def _unwritable(target: Path, max_shard_bytes: int) -> Exception | None:
    if max_shard_bytes <= 0:
        return InvalidValueError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number of bytes")
    if not target.parent.is_dir():
        return InvalidValueError(f"path is '{target}', but its folder does not exist: make it first")
    if target.is_dir():
        return InvalidValueError(f"path is '{target}', which is a folder: name the file")
    return None


def _ambiguous(entries: Sequence[_Entry], shards: Shards) -> Exception | None:
    """Why a name means more than one tensor, if it does, as those of experts do that only some ranks hold."""
    for entry in entries:
        sharding = None if entry.item is None else shards.shardings[entry.item]
        ranks = () if sharding is None or sharding.replicas else sharding.global_ranks()
        if ranks and 0 not in ranks:
            return InvalidValueError(
                f"'{entry.name}' is held by ranks {list(ranks)} without rank 0, which has a tensor of its own under "
                "that name, as in expert parallelism: one file cannot hold both. Use the engine's own checkpoints"
            )
    return None


class _Writer:
    """The files of one save, written in the order of the entries, under temporary names until all are complete."""

    def __init__(self, target: Path, entries: Sequence[_Entry], metadata: dict[str, str], max_shard_bytes: int) -> None:
        self.target, self.entries, self.metadata = target, entries, metadata
        self.total = sum(entry.nbytes for entry in entries)
        self._written = 0
        self._position = 0  # of the next entry
        self._shards = _cut(entries, max_shard_bytes)
        token = secrets.token_hex(4)
        count = len(self._shards)
        stem = target.name.removesuffix(".safetensors")
        self._names = (
            [target.name]
            if count == 1
            else [f"{stem}-{token}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._temporary = [target.parent / f".{name}.{token}.tmp" for name in self._names]
        self._file: Any = None

    def write_item(self, item: int, tensor: torch.Tensor) -> int:
        """Write the next entry, which is parameter ``item``; returns the bytes written so far."""
        entry = self.entries[self._position]
        assert entry.item == item
        return self._write(entry, tensor)

    def write_buffers(self) -> int:
        """Write the entries that are left; returns the bytes written so far."""
        while self._position < len(self.entries):
            entry = self.entries[self._position]
            assert entry.buffer is not None
            self._write(entry, entry.buffer)
        return self._written

    def _write(self, entry: _Entry, tensor: torch.Tensor) -> int:
        shard = next(i for i, span in enumerate(self._shards) if self._position in span)
        if self._position == self._shards[shard].start:
            self._open(shard)
        disk.write_tensor(self._file, tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous())
        self._written += entry.nbytes
        self._position += 1
        return self._written

    def _open(self, shard: int) -> None:
        self._close()
        self._file = open(self._temporary[shard], "wb")  # noqa: SIM115  (closed with the next, or at the end)
        chosen = [self.entries[i] for i in self._shards[shard]]
        self._file.write(files.header([(e.name, e.dtype, e.shape) for e in chosen], self.metadata))

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Put the complete files in the place of what was there."""
        if not self.entries:
            self._open(0)
        self._close()
        index = files.index_path(self.target)
        old = files.shards_of(self.target)
        for temporary, name in zip(self._temporary, self._names, strict=True):
            os.replace(temporary, self.target.parent / name)
        if len(self._names) > 1:
            weights = {
                self.entries[i].name: name for name, span in zip(self._names, self._shards, strict=True) for i in span
            }
            temporary = self.target.parent / f".{index.name}.tmp"
            temporary.write_text(json.dumps({"metadata": {"total_size": self.total}, "weight_map": weights}, indent=1))
            os.replace(temporary, index)
            self.target.unlink(missing_ok=True)
        else:
            index.unlink(missing_ok=True)
        for path in old:
            if path.name not in self._names:
                path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove what was not finished."""
        if self._file is not None:
            self._file.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)


def _cut(entries: Sequence[_Entry], max_shard_bytes: int) -> list[range]:
    spans, start, filled = [], 0, 0
    for position, entry in enumerate(entries):
        if filled and filled + entry.nbytes > max_shard_bytes:
            spans.append(range(start, position))
            start, filled = position, 0
        filled += entry.nbytes
    return [*spans, range(start, len(entries))]


def _match(entries: Sequence[_Entry], tied: Mapping[str, str], reader: files.Reader, strict: bool) -> None:
    known = {entry.name: entry for entry in entries}
    missing = sorted(set(known) - set(reader.shapes))
    unexpected = sorted(set(reader.shapes) - set(known) - set(tied))
    if strict and (missing or unexpected):
        raise InvalidValueError(
            f"the file does not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}; pass "
            "strict=False to load what both have"
        )
    for name, shape in reader.shapes.items():
        if name in known and tuple(known[name].shape) != shape:
            raise InvalidValueError(
                f"'{name}' has shape {shape} in the file and {tuple(known[name].shape)} in the model"
            )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"


def _pieces(entry: _Entry, shards: Shards, reader: files.Reader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's target and what the file has for it."""
    if entry.buffer is not None:
        yield entry.buffer, reader.tensor(entry.name)
    elif entry.item is not None:
        sharding, target = shards.shardings[entry.item], shards.local(entry.item)
        fragment = sharding.layout.fragments[sharding.rank]
        if target is not None and fragment is not None:
            yield target, reader.fragment(entry.name, sharding.layout.shape, fragment)

"""One consolidated safetensors file from any run."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from ds_fragment.checkpoint import files
from ds_fragment.checkpoint.background import BackgroundSave, begin, finish_earlier
from ds_fragment.checkpoint.optimizer import OptimizerState
from ds_fragment.checkpoint.tensors import (
    Selection,
    ShardValues,
    Tensors,
    What,
    apart,
    collect,
    differences,
    experts,
    part_sums,
)
from ds_fragment.checkpoint.writer import MAX_SHARD_BYTES, Entry, Order, Writer
from ds_fragment.collective.agree import agree, everyone, share
from ds_fragment.collective.digest import checksums
from ds_fragment.collective.exchange import Locate, Shards as Found
from ds_fragment.engines.optimized import Optimizers
from ds_fragment.engines.shards import Shards
from ds_fragment.errors import InvalidValueError

_HOST = torch.device("cpu")


@overload
def save_full(
    what: What,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizers | bool | None = ...,
    include: Selection | None = ...,
    exclude: Selection | None = ...,
    values: ShardValues | None = ...,
    dtype: torch.dtype | None = ...,
    bucket_bytes: int | None = ...,
    max_shard_bytes: int = ...,
    metadata: Mapping[str, str] | None = ...,
    progress: files.Progress = ...,
    background: Literal[False] = ...,
) -> None: ...


@overload
def save_full(
    what: What,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizers | bool | None = ...,
    include: Selection | None = ...,
    exclude: Selection | None = ...,
    values: ShardValues | None = ...,
    dtype: torch.dtype | None = ...,
    bucket_bytes: int | None = ...,
    max_shard_bytes: int = ...,
    metadata: Mapping[str, str] | None = ...,
    progress: files.Progress = ...,
    background: Literal[True],
) -> BackgroundSave: ...


def save_full(
    what: What,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizers | bool | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    values: ShardValues | None = None,
    dtype: torch.dtype | None = None,
    bucket_bytes: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: files.Progress = None,
    background: bool = False,
) -> BackgroundSave | None:
    """Write whole tensors of any run to a safetensors file. All ranks of the default group must call it.

    The true values are gathered bucket by bucket to rank 0, which writes them. The file is written under a temporary
    name and renamed when it is complete: a run that is killed leaves the file that was there, and the next save to the
    same path removes what it left. Tied tensors are stored once; the metadata entry ``tied`` says under which other
    names they are known (JSON, alias to name).

    Where ranks have other names than rank 0, as the stages of a pipeline do, the lowest rank of each stage writes the
    stage's own files, and one index names them all. All of these ranks need to see the folder. What several stages have
    under one name, such as tied embeddings, is stored once if it has the same bits on all of them.

    Optimizer state goes into a safetensors file of its own beside the first, ``model-TOKEN.optimizer``, which becomes
    current together with it; its metadata has the parameter groups. Before the first step it has nothing else.

    Args:
        what: a module, wrapped or not, whose parameters and persistent buffers are stored under their names in the
            user's own model; a mapping from names to tensors, or (name, tensor) pairs, of sharded or of plain tensors;
            or a `Shadow`. A plain buffer of a module is that of the rank that writes.
        path: ``model.safetensors``, say, in a folder that exists. Above ``max_shard_bytes`` there are several files
            beside it, and ``model.safetensors.index.json`` says what is where, as Hugging Face's loaders expect.
        optimizer: True to store the optimizer state and the parameter groups of the parameters that are stored, of the
            optimizers that were attached or that the engine has; or the optimizers themselves.
        include: what is stored: patterns of names as `fnmatch` has them (``"*lora_*"``), or a function of the name;
            all unless told.
        exclude: what of it is not.
        values: a `Shadow` of the model, whose parameters are stored in the place of the model's own.
        dtype: what floating-point tensors are stored as; their own dtype, that of the fp32 master where there is one,
            unless told. Buffers of a module keep theirs.
        bucket_bytes: how much travels at once; see `iter_full`.
        max_shard_bytes: the largest file, in bytes of tensors.
        metadata: strings to store in the header.
        progress: True for a bar (or, without rich, log lines) on the ranks that write, or a function called there, in
            a thread, with bytes written and bytes in all.
        background: return as soon as the tensors are on the host of the ranks that write, which need memory for all
            of them, and write while training goes on; see `BackgroundSave`.

    Returns:
        None, or the save that is under way.

    Warns:
        UserWarning: a hyperparameter is nothing that JSON holds, and is left out.

    Raises:
        TypeError: ``what`` is something else.
        InvalidValueError: an argument is wrong; a pattern matches nothing; or two ranks hold different tensors under
            one name, as experts of expert-parallel ranks are, so that one would be lost. The same on every rank.
        UnlinkedParameterError: no optimizer updates any of the parameters.
        StateKeyError: the optimizer keeps something that a file of plain tensors cannot give back.
        FragmentError: a shard could not be read, or a rank could not write; the same on every rank.
    """
    finish_earlier()
    plan = _Plan(
        what,
        files.path_of(path),
        optimizer,
        include,
        exclude,
        values,
        dtype,
        metadata or {},
        max_shard_bytes,
        background,
    )
    writer = plan.writer()
    save = BackgroundSave(writer, plan.leaders, plan.token, progress, background=background)
    shards = plan.shards
    with shards.named_if_broken(range(len(shards.params))):
        try:
            failure = plan.stream(save, writer, bucket_bytes)
            agree(failure, everyone(), _HOST)
        except BaseException as error:
            save.end(error)
            raise
        save.end()
        if background:
            begin(save)
            return save
        save.wait()
    return None


@dataclass(frozen=True)
class _Stage:
    """Ranks that have the same names: one pipeline stage, or all.

    Attributes:
        ranks: global ones; the first writes.
        entries: what they have.
        tied: further names.
    """

    ranks: list[int]
    entries: list[Entry]
    tied: dict[str, str]


class _Plan:
    """What is saved, and by whom; all ranks agree on it.

    Attributes:
        shards: the sharded tensors of this rank.
        leaders: the ranks that write.
        token: of the save.
    """

    def __init__(
        self,
        what: Any,
        target: Path,
        optimizer: Optimizers | bool | None,
        include: Selection | None,
        exclude: Selection | None,
        values: ShardValues | None,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        max_shard_bytes: int,
        background: bool,
    ) -> None:
        self._target, self._metadata, self._max_shard_bytes = target, metadata, max_shard_bytes
        tensors, error = Tensors(), None
        optimizer = None if optimizer is False else optimizer
        wanted = optimizer is not None
        try:
            tensors = collect(what, include, exclude)
            _check_target(target, max_shard_bytes)
            files.require_metadata(metadata)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise InvalidValueError(f"dtype is {dtype!r}, expected a floating-point dtype, or None")
            if wanted and (isinstance(what, ShardValues) or values is not None):
                raise InvalidValueError("optimizer is given, but its state does not belong to the values of a Shadow")
        except Exception as caught:
            error = caught
        names = ("max_shard_bytes", "background", "dtype", "optimizer")
        sums = [
            zlib.crc32(str(max_shard_bytes).encode()),
            int(background),
            zlib.crc32(str(dtype).encode()),
            int(wanted),
        ]
        agree(error, everyone(), _HOST, sums, lambda i: names[i])
        self.shards = Shards(list(tensors.sharded.values()), "value", "save_full")
        self._buffers = list(tensors.buffers.values())
        self._stages, self.token = _stages(_entries(tensors, self.shards, dtype), tensors)
        self.leaders = [stage.ranks[0] for stage in self._stages]
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._stage = next(stage for stage in self._stages if rank in stage.ranks)
        self._leads = rank == self._stage.ranks[0]
        self._order = Order.of([stage.entries for stage in self._stages])
        at = self._stages.index(self._stage)
        self._positions = self._order.positions[at]
        self._pieces: Locate = self.shards.pieces
        stands_in = what if isinstance(what, ShardValues) else values
        parts, shared = dict[str, tuple[int, int]](), set[str]()
        try:
            if stands_in is not None:
                self._pieces = stands_in.locate(self.shards)
            for problem in experts(self.shards, tensors.sharded, len(self._stage.ranks)):
                raise InvalidValueError(problem)
            shared = self._check_names()
            parts = self._part_sums(shared)
        except Exception as caught:
            error = caught
        agree(error, everyone(), _HOST)
        self._compare(parts, bool(shared))
        self._state: OptimizerState | None = None
        if optimizer is not None:
            self._state = OptimizerState(tensors.sharded, optimizer, leaders=self.leaders, at=at)

    def _check_names(self) -> set[str]:
        """The names that several stages have, as those of tied weights of the first and the last one.

        Raises:
            CheckpointError: a dtype cannot be stored.
            InvalidValueError: a name is that of tensors of different shapes or dtypes.
        """
        owners: dict[str, tuple[_Stage, Entry]] = {}
        shared = set()
        for stage in self._stages:
            for entry in stage.entries:
                files.require_dtype(entry.name, entry.dtype)
                other, first = owners.setdefault(entry.name, (stage, entry))
                if first != entry:
                    raise InvalidValueError(
                        f"'{entry.name}' is a tensor of ranks {_ranks(other)} and another of ranks {_ranks(stage)}, "
                        "of another shape or dtype: one file cannot hold both. Give each its own name, or leave it "
                        "out on one side"
                    )
                if other is not stage:
                    shared.add(entry.name)
        return shared

    def _part_sums(self, shared: Collection[str]) -> dict[str, tuple[int, int]]:
        """See `part_sums`: by name, of what other ranks may have another tensor of."""
        ranks, shardings = len(self._stage.ranks), self.shards.shardings
        names = [entry.name for entry in self._stage.entries]
        items = [
            item
            for item, sharding in enumerate(shardings)
            if names[item] in shared or (ranks > 1 and apart(sharding, ranks))
        ]
        found = {names[item]: part for item, part in part_sums(self.shards, items, self._pieces).items()}
        for name, buffer in zip(names[len(shardings) :], self._buffers, strict=True):
            if name in shared:
                found[name] = (0, checksums([buffer])[0])
        return found

    def _compare(self, sums: Mapping[str, tuple[int, int]], shared: bool) -> None:
        """Raise if ranks hold different tensors under one name; all ranks must call it.

        Args:
            sums: see `_part_sums`.
            shared: whether several stages have one name.
        """
        digests = share(zlib.crc32(repr(sorted(sums.items())).encode()))
        if not shared and all(len({digests[rank] for rank in stage.ranks}) == 1 for stage in self._stages):
            return  # each rank has the same, and all of it
        for name, (one, other) in differences(share([[name, *sums[name]] for name in sums])).items():
            raise InvalidValueError(
                f"'{name}' differs on ranks {one} and {other}, which hold the same part of it, and one file cannot "
                "hold both: give each its own name if they are different tensors, as in expert parallelism; else the "
                "ranks have trained apart"
            )

    def writer(self) -> Writer | None:
        """What this rank writes with; None if it does not."""
        if not self._leads:
            return None
        tied = {alias: name for stage in self._stages for alias, name in stage.tied.items()}
        words = {**self._metadata, **({"tied": json.dumps(tied)} if tied else {})}
        order, limit = self._order, self._max_shard_bytes
        beside = None if self._state is None else self._state.writer(self._target, limit, self.token)
        return Writer(self._target, order.entries, words, limit, token=self.token, cuts=order.starts, beside=beside)

    def stream(self, save: BackgroundSave, writer: Writer | None, bucket_bytes: int | None) -> Exception | None:
        """Gather everything to the ranks that write; returns this rank's error, which the others need to be told."""
        failure: Exception | None = None

        def locate(items: Sequence[int]) -> Found:
            if failure is not None:
                raise failure  # travels to every rank with the next bucket
            return self._pieces(items)

        dst = self._stage.ranks[0] if dist.is_initialized() else None
        try:
            if writer is not None and self._stage is self._stages[0]:
                writer.begin()
        except Exception as caught:
            failure = caught
        try:
            count = len(self.shards.params)
            for position, tensor in self.shards.full(self._positions[:count], bucket_bytes, dst, locate):
                failure = failure or self._put(save, writer, position, tensor)
            for position, buffer in zip(self._positions[count:], self._buffers, strict=True):
                failure = failure or self._put(save, writer, position, buffer)
        except Exception as caught:
            failure = caught
        if self._state is not None:
            beside = writer and writer.beside
            put = partial(self._put, save, beside)
            failure = self._state.stream(put, dst, bucket_bytes, failure)
        return failure

    def _put(
        self, save: BackgroundSave, writer: Writer | None, position: int | None, tensor: torch.Tensor
    ) -> Exception | None:
        try:
            if writer is not None and position is not None:
                save.put(writer, position, tensor)
        except Exception as error:
            return error
        return None


def _check_target(target: Path, max_shard_bytes: int) -> None:
    if not isinstance(max_shard_bytes, int) or max_shard_bytes <= 0:
        raise InvalidValueError(f"max_shard_bytes is {max_shard_bytes!r}, expected a positive number of bytes")
    if target.is_dir():
        raise InvalidValueError(f"path is '{target}', which is a folder: name the file, as in 'model.safetensors'")
    if target.suffix != ".safetensors":
        raise InvalidValueError(f"path is '{target}', expected a name that ends in .safetensors, which the file is")
    if not target.parent.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        raise InvalidValueError(f"path is '{target}', but its folder does not exist: make it first")


def _entries(tensors: Tensors, shards: Shards, dtype: torch.dtype | None) -> list[Entry]:
    entries = []
    for item, (name, sharding) in enumerate(zip(tensors.sharded, shards.shardings, strict=True)):
        cast = dtype is not None and sharding.dtype.is_floating_point and item < tensors.cast
        entries.append(Entry(name, dtype if cast and dtype is not None else sharding.dtype, sharding.shape))
    return [*entries, *(Entry(name, buffer.dtype, buffer.shape) for name, buffer in tensors.buffers.items())]


def _stages(entries: Sequence[Entry], tensors: Tensors) -> tuple[list[_Stage], str]:
    """The ranks by what they have, in rank order, and a token for the save; all ranks must call it."""
    mine = {"entries": [entry.to_json() for entry in entries], "tied": tensors.tied}
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    heads = share([digest, secrets.token_hex(4), tensors.unmatched])
    unmatched = set[str].intersection(*(set(patterns) for _, _, patterns in heads))
    if unmatched:
        raise InvalidValueError(
            f"include or exclude has {', '.join(map(repr, sorted(unmatched)))}, which matches no name: names are those "
            "of the user's own model, as iter_full gives them"
        )
    ranks: dict[str, list[int]] = {}
    for rank, (found, _, _) in enumerate(heads):
        ranks.setdefault(found, []).append(rank)
    if len(ranks) == 1:
        return [_Stage(ranks[digest], list(entries), tensors.tied)], heads[0][1]
    me = dist.get_rank()
    told = share(mine if ranks[digest][0] == me else None)
    stages = []
    for members in ranks.values():
        has = told[members[0]]
        stages.append(_Stage(members, list(map(Entry.from_json, has["entries"])), has["tied"]))
    return stages, heads[0][1]


def _ranks(stage: _Stage) -> str:
    return f"{stage.ranks[:4]}{' and more' if len(stage.ranks) > 4 else ''}"

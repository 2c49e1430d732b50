"""One consolidated safetensors file from any run."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from ds_fragment.checkpoint import files
from ds_fragment.checkpoint.background import BackgroundSave, begin, finish_earlier
from ds_fragment.checkpoint.optimizer import OptimizerState
from ds_fragment.checkpoint.tensors import Selection, ShardValues, Tensors, What, collect
from ds_fragment.checkpoint.writer import MAX_SHARD_BYTES, Entry, Writer
from ds_fragment.collective.agree import agree, everyone, share
from ds_fragment.collective.digest import checksums
from ds_fragment.collective.exchange import Locate, Shards as Found
from ds_fragment.collective.plan import Plan, bucket_bytes_for
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
    stage's own files, and one index names them all. All of these ranks need to see the folder.

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
        dtype: what floating-point parameters are stored as; their own dtype, that of the fp32 master where there is
            one, unless told. Buffers keep theirs.
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
    plan = _Plan(what, Path(path), optimizer, include, exclude, values, dtype, max_shard_bytes, background)
    writer = plan.writer(metadata or {}, max_shard_bytes)
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
        max_shard_bytes: int,
        background: bool,
    ) -> None:
        self._target = target
        tensors, error = Tensors(), None
        wanted = optimizer is not None and optimizer is not False
        try:
            tensors = collect(what, include, exclude)
            _check_target(target, max_shard_bytes)
            if dtype is not None and not dtype.is_floating_point:
                raise InvalidValueError(f"dtype is {dtype}, expected a floating-point dtype, or None")
            if wanted and (isinstance(what, ShardValues) or values is not None):
                raise InvalidValueError("optimizer is given, but its state does not belong to the values of a Shadow")
        except Exception as caught:
            error = caught
        names = ("max_shard_bytes", "background", "dtype", "optimizer")
        sums = [max_shard_bytes, int(background), zlib.crc32(str(dtype).encode()), int(wanted)]
        agree(error, everyone(), _HOST, sums, lambda i: names[i])
        self.shards = Shards(list(tensors.sharded.values()), "value", "save_full")
        self._buffers = list(tensors.buffers.values())
        self._stages, self.token = _stages(_entries(tensors, self.shards, dtype), tensors)
        self.leaders = [stage.ranks[0] for stage in self._stages]
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._stage = next(stage for stage in self._stages if rank in stage.ranks)
        self._leads = rank == self._stage.ranks[0]
        self._start = 0  # of this rank's entries among all
        for stage in self._stages[: self._stages.index(self._stage)]:
            self._start += len(stage.entries)
        self._pieces: Locate = self.shards.pieces
        stands_in = what if isinstance(what, ShardValues) else values
        try:
            if stands_in is not None:
                self._pieces = stands_in.locate(self.shards)
            self._check_names()
            sums = self._sums_of_whole()
        except Exception as caught:
            error, sums = caught, []
        agree(error, everyone(), _HOST)
        self._compare(sums)
        self._state: OptimizerState | None = None
        if optimizer is not None and optimizer is not False:
            at = self._stages.index(self._stage)
            self._state = OptimizerState(tensors.sharded, optimizer, leaders=self.leaders, at=at)

    def _check_names(self) -> None:
        """Raise if one name means several tensors, or a dtype cannot be stored."""
        owners: dict[str, _Stage] = {}
        for stage in self._stages:
            for entry in stage.entries:
                files.require_dtype(entry.name, entry.dtype)
                other = owners.setdefault(entry.name, stage)
                if other is not stage:
                    raise InvalidValueError(
                        f"'{entry.name}' is a tensor of ranks {_ranks(other)} and another of ranks {_ranks(stage)}, "
                        "which have other names beside it: one file cannot hold both. Give each its own name, or leave "
                        "it out on one side"
                    )
        for entry, sharding in zip(self._stage.entries, self.shards.shardings, strict=False):
            ranks = () if sharding.replicas else sharding.global_ranks()
            if ranks and self._stage.ranks[0] not in ranks:
                raise InvalidValueError(
                    f"'{entry.name}' is held by ranks {list(ranks)} without rank {self._stage.ranks[0]}, which has a "
                    "tensor of its own under that name, as in expert parallelism: one file cannot hold both. Use "
                    "the engine's own checkpoints, or give each its own name"
                )

    def _sums_of_whole(self) -> list[int]:
        """A sum of the bits of each sharded tensor that this rank holds whole; 0 for the rest."""
        shardings = self.shards.shardings
        alone = [item for item, sharding in enumerate(shardings) if sharding.alone]
        sums = [0] * len(shardings)
        if len(self._stage.ranks) > 1:
            for bucket in Plan([shardings[item] for item in alone], bucket_bytes_for(shardings)).buckets:
                items = [alone[at] for at in bucket.items]
                for item, total in zip(items, checksums(self._pieces(items)), strict=True):
                    sums[item] = total
        return sums

    def _compare(self, sums: Sequence[int]) -> None:
        """Raise if ranks of one stage hold different tensors under one name."""
        digests = share(hash(tuple(sums)))
        differ = [stage for stage in self._stages if len({digests[rank] for rank in stage.ranks}) > 1]
        if not differ:
            return
        rows = share(list(sums))
        for stage in differ:
            for item, entry in enumerate(stage.entries):
                found = {rank: rows[rank][item] for rank in stage.ranks if item < len(rows[rank])}
                other = next((rank for rank in found if found[rank] != found[stage.ranks[0]]), None)
                if other is not None:
                    raise InvalidValueError(
                        f"'{entry.name}' differs on ranks {stage.ranks[0]} and {other}, which each hold it whole, and "
                        "one file cannot hold both: give each its own name if they are different tensors, as experts "
                        "are; else the ranks have trained apart"
                    )

    def writer(self, metadata: Mapping[str, str], max_shard_bytes: int) -> Writer | None:
        """What this rank writes with; None if it does not."""
        if not self._leads:
            return None
        entries = [entry for stage in self._stages for entry in stage.entries]
        tied = {alias: name for stage in self._stages for alias, name in stage.tied.items()}
        words = {**metadata, **({"tied": json.dumps(tied)} if tied else {})}
        cuts, end = [], 0
        for stage in self._stages:
            cuts.append(end)
            end += len(stage.entries)
        beside = None if self._state is None else self._state.writer(self._target, max_shard_bytes, self.token)
        return Writer(self._target, entries, words, max_shard_bytes, token=self.token, cuts=cuts, beside=beside)

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
            for item, tensor in self.shards.full(range(len(self.shards.params)), bucket_bytes, dst, locate):
                if failure is None:
                    failure = self._put(save, writer, self._start + item, tensor)
            buffers = self._start + len(self.shards.params)
            for at, buffer in enumerate(self._buffers):
                if failure is None:
                    failure = self._put(save, writer, buffers + at, buffer)
        except Exception as caught:
            failure = caught
        if self._state is not None:
            beside = writer and writer.beside
            put = partial(self._put, save, beside)
            failure = self._state.stream(put, dst, bucket_bytes, failure)
        return failure

    def _put(
        self, save: BackgroundSave, writer: Writer | None, position: int, tensor: torch.Tensor
    ) -> Exception | None:
        try:
            if writer is not None:
                save.put(writer, position, tensor)
        except Exception as error:
            return error
        return None


def _check_target(target: Path, max_shard_bytes: int) -> None:
    if max_shard_bytes <= 0:
        raise InvalidValueError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number of bytes")
    if target.is_dir():
        raise InvalidValueError(f"path is '{target}', which is a folder: name the file, as in 'model.safetensors'")
    if target.suffix != ".safetensors":
        raise InvalidValueError(f"path is '{target}', expected a name that ends in .safetensors, which the file is")
    if not target.parent.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        raise InvalidValueError(f"path is '{target}', but its folder does not exist: make it first")


def _entries(tensors: Tensors, shards: Shards, dtype: torch.dtype | None) -> list[Entry]:
    entries = []
    for item, (name, sharding) in enumerate(zip(tensors.sharded, shards.shardings, strict=True)):
        cast = dtype is not None and sharding.dtype.is_floating_point and item < tensors.parameters
        entries.append(Entry(name, dtype if cast and dtype is not None else sharding.dtype, sharding.shape))
    return [*entries, *(Entry(name, buffer.dtype, buffer.shape) for name, buffer in tensors.buffers.items())]


def _stages(entries: Sequence[Entry], tensors: Tensors) -> tuple[list[_Stage], str]:
    """The ranks by what they have, in rank order, and a token for the save; all ranks must call it."""
    rows = [[entry.name, str(entry.dtype).removeprefix("torch."), list(entry.shape)] for entry in entries]
    mine = {"rows": rows, "tied": tensors.tied}
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
        found = [Entry(name, getattr(torch, kind), torch.Size(shape)) for name, kind, shape in has["rows"]]
        stages.append(_Stage(members, found, has["tied"]))
    return stages, heads[0][1]


def _ranks(stage: _Stage) -> str:
    return f"{stage.ranks[:4]}{' and more' if len(stage.ranks) > 4 else ''}"

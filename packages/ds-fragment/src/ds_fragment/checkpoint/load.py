"""A consolidated safetensors file, whoever wrote it, into any run."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.checkpoint import files
from ds_fragment.checkpoint.background import finish_earlier
from ds_fragment.checkpoint.conversions import conversions
from ds_fragment.checkpoint.optimizer import OptimizerLoad
from ds_fragment.checkpoint.tensors import Tensors, apart, collect, differences, experts, part_sums, some
from ds_fragment.collective.agree import agree, everyone, share
from ds_fragment.engines.model import is_model, unwrapped, unwrapped_names
from ds_fragment.engines.optimized import Optimizers
from ds_fragment.engines.shards import Shards, refresh
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import InvalidValueError

MapNames = Mapping[str, str] | Callable[[str], str | None]

_HOST = torch.device("cpu")
_log = logging.getLogger("ds.fragment")


def load_full(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizers | bool | None = None,
    strict: bool = True,
    map_names: MapNames | None = None,
    refresh_lp: bool = True,
    progress: files.Progress = None,
) -> None:
    """Write a safetensors file into a sharded model. All ranks of the default group must call it.

    Each rank reads no more than its own pieces, one after the other; every rank must be able to open the file. Nothing
    is written before all ranks have found every tensor, with the right shape and values that its dtype can hold. A
    file that cannot be read to its end leaves the model half loaded, and is an error on every rank.

    A name in the file is taken as it is if the model has it. Else what wrappers put into names is taken off, and the
    model's ``base_model_prefix``, as models of transformers have it, is put before it or taken off. A tied tensor may
    be there under any of its names, and under several if they are equal.

    Optimizer state goes into any engine, whichever saved it, and a fresh optimizer is made to have it. The parameter
    groups get all hyperparameters of the file but for the choice of an implementation (``fused`` and such). What a
    learning-rate schedule, a loss scaler or an engine has counted is not in the file.

    Args:
        model: the sharded model, wrapped or not.
        path: the file; its index, or the name under which it was saved in several files; or a folder with one model, as
            `save_full` or ``save_pretrained`` leave it, or as Hugging Face caches a repository.
        optimizer: True to load the optimizer state and the parameter groups too, into the optimizers that were attached
            or that the engine has; or the optimizers themselves.
        strict: whether names that only the file or only the model has are an error; else they are logged as INFO. Names
            that only the file has and that the model's ``_keys_to_ignore_on_load_unexpected`` matches never are.
        map_names: what a name in the file is called in the model: a mapping of those that differ, or a function,
            which returns None for a tensor that is to be left out. Given, nothing of transformers' table is applied.
        refresh_lp: bring the low-precision weights up to date at once.
        progress: True for a bar (or, without rich, log lines) on rank 0, or a function called on every rank with bytes
            done and bytes in all.

    Warns:
        UserWarning: values were rounded to a dtype with fewer digits; sets of ranks that each hold a tensor of one name
            with different values now hold the same; or the optimizer is of another class than that which saved.

    Raises:
        CheckpointError: there is no such file, or it is damaged; on every rank.
        InvalidValueError: the file does not fit the model: everything that is missing, unexpected, of another shape,
            or of a value that its dtype in the model cannot hold, and why the optimizer state does not fit, in one
            message; on every rank.
        ImportError: safetensors is not installed: ``pip install ds-fragment[safetensors]``.
    """
    finish_earlier()
    load = _Load(model, strict, map_names, optimizer)
    with load.open(files.path_of(path)) as reader, load.open_optimizer(reader) as state:
        load.check(reader, state)
        load.write(reader, state, progress)
    if refresh_lp:
        refresh(load.shards, None)


@dataclass
class _Found:
    """How the names of a file fit those of the model.

    Attributes:
        sources: by name in the model, the names of what the file has for it.
        missing: names that only the model has.
        unexpected: names that only the file has.
    """

    sources: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


class _Load:
    """What is loaded into; all ranks make it together.

    Attributes:
        shards: the model's sharded tensors.
    """

    def __init__(
        self, model: nn.Module, strict: bool, map_names: MapNames | None, optimizer: Optimizers | bool | None
    ) -> None:
        self._strict, self._map_names = strict, map_names
        self._optimizer = None if optimizer is False else optimizer
        tensors, error = Tensors(), None
        try:
            if not is_model(model):
                raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
            if not (map_names is None or callable(map_names) or isinstance(map_names, Mapping)):
                raise TypeError(f"map_names is a {type(map_names).__name__}, expected a mapping of names or a function")
            tensors = collect(model)
            own = self._own = unwrapped(model)
            prefix = getattr(own, "base_model_prefix", "")
            self._prefix = prefix if isinstance(prefix, str) else ""
            self._ignored = list(getattr(own, "_keys_to_ignore_on_load_unexpected", None) or ())
        except Exception as caught:
            error = caught
        sums, words = [int(strict), int(self._optimizer is not None)], ("strict", "optimizer")
        agree(error, everyone(), _HOST, sums, lambda i: words[i])
        self.shards = Shards(list(tensors.sharded.values()), "value", "load_full")
        self._sharded = tensors.sharded
        self._items = {name: item for item, name in enumerate(tensors.sharded)}
        self._buffers, self._tied = tensors.buffers, tensors.tied
        self._found = _Found()
        self._renamed: dict[str, str] = {}

    def open(self, path: Path) -> files.Reader:
        """The file, which is the same on every rank."""
        reader, error, sums = None, None, list[int]()
        try:
            reader = files.Reader(path)
            sums = reader.sums()
        except Exception as caught:
            error = caught
        agree(error, everyone(), _HOST, sums, lambda i: f"the file '{path}' (part {i})")
        assert reader is not None
        return reader

    @contextlib.contextmanager
    def open_optimizer(self, reader: files.Reader) -> Iterator[OptimizerLoad | None]:
        """The optimizer state that belongs to the file, to be loaded; None if it is not asked for, or not there."""
        name = Path(reader.metadata.get("optimizer", "")).name
        if self._optimizer is None or not name:
            yield None
            return
        with self.open(reader.path.with_name(name)) as beside:
            options: dict[str, Any] = {"rename": self._target, "strict": self._strict}
            with OptimizerLoad(self._sharded, self._optimizer, beside, **options) as state:
                yield state

    def check(self, reader: files.Reader, state: OptimizerLoad | None) -> None:
        """Raise on every rank what does not fit on any, in one message."""
        problems, rounded, error = list[str](), list[str](), None
        if self._optimizer is not None:
            absent = ["it has no optimizer state: save it with save_full(..., optimizer=True)"]
            problems += absent if state is None else state.problems
        try:
            self._convert(reader)
            self._found = self._resolve(reader)
            for name, sources in self._found.sources.items():
                problems += self._misfits(reader, name, sources, rounded)
            for item, (adapter, param) in enumerate(zip(self.shards.adapters, self.shards.params, strict=True)):
                adapter.require_writable(param)
                self.shards.local(item)
            problems += experts(self.shards, self._items, dist.get_world_size() if dist.is_initialized() else 1)
        except Exception as caught:
            error = caught
        agree(error, everyone(), _HOST)
        told = share([self._found.missing, self._found.unexpected, problems, rounded, len(self._found.sources)])
        missing = sorted({name for row in told for name in row[0]})
        unexpected = sorted(set[str].intersection(*(set(row[1]) for row in told)))
        misfits = list(dict.fromkeys(problem for row in told for problem in row[2]))
        if self._strict and (missing or unexpected):
            fix = "" if misfits else "; pass strict=False to load what both have"
            misfits.insert(0, f"missing {some(missing)}, unexpected {some(unexpected)}{fix}")
        elif unexpected and not any(row[4] for row in told):
            misfits.insert(0, f"they have no name in common, as the file has {some(unexpected)}; see map_names")
        if misfits:
            raise InvalidValueError(f"the file '{reader.path}' does not fit the model: {_joined(misfits)}")
        if missing or unexpected:
            _log.info("%s is loaded in part: missing %s, unexpected %s", reader.path, some(missing), some(unexpected))
        copies = self._apart()
        names = sorted({name for row in told for name in row[3]})
        if not dist.is_initialized() or dist.get_rank() == 0:
            if names:
                warnings.warn(
                    f"the file '{reader.path}' has more digits than the model's dtypes hold; rounded: {some(names)}",
                    stacklevel=3,
                )
            if copies:
                warnings.warn(
                    f"ranks hold {some(copies)} apart, with different values, and now all get those of the file: right "
                    "for what tensor-parallel ranks each have a copy of, wrong for experts of one name each",
                    stacklevel=3,
                )

    def _convert(self, reader: files.Reader) -> None:
        """Have what transformers makes of tensors that the model does not have as they are in the file."""
        if self._map_names is not None:
            return
        strange = []
        for name, shape in reader.shapes.items():
            target = self._target(name)
            if target is None or self._kind(target)[1] != shape:
                strange.append(name)
        found = conversions(self._own, reader, strange, [*self._items, *self._buffers, *self._tied])
        self._renamed = found.renamed
        reader.replace(found.used, found.made)

    def _resolve(self, reader: files.Reader) -> _Found:
        """Which of the file's tensors is for which of the model's."""
        found = _Found()
        stored = {name: name for name in reader.shapes}
        tied = reader.json("tied", dict)
        stored.update((alias, name) for alias, name in tied.items() if alias not in stored and name in stored)
        for alias, name in stored.items():
            target = self._target(alias)
            if target is not None and name not in found.sources.setdefault(target, []):
                found.sources[target].append(name)
            elif target is None and alias == name and not any(re.search(each, name) for each in self._ignored):
                found.unexpected.append(name)
        found.missing = [name for name in (*self._items, *self._buffers) if name not in found.sources]
        return found

    def _target(self, stored: str) -> str | None:
        """The model's name for a name in the file; None if the tensor is left out, or is not the model's."""
        name: str | None = self._renamed.get(stored, stored)
        if isinstance(self._map_names, Mapping):
            name = self._map_names.get(stored, stored)
        elif self._map_names is not None:
            name = self._map_names(stored)
        if not isinstance(name, str | None):
            raise InvalidValueError(
                f"map_names gives {name!r} for '{stored}', expected a name, or None to leave it out"
            )
        if name is None:
            self._ignored.append(re.escape(stored))
            return None
        for candidate in self._candidates(name):
            candidate = self._tied.get(candidate, candidate)
            if candidate in self._items or candidate in self._buffers:
                return candidate
        return None

    def _candidates(self, name: str) -> Iterator[str]:
        for candidate in unwrapped_names(name):
            yield candidate
            if self._prefix:
                yield f"{self._prefix}.{candidate}"
                yield candidate.removeprefix(f"{self._prefix}.")

    def _misfits(self, reader: files.Reader, name: str, sources: Sequence[str], rounded: list[str]) -> Iterator[str]:
        """What is wrong with a tensor of the file for one of the model; reads it only where values have to be seen."""
        dtype, shape = self._kind(name)
        for source in sources:
            if reader.shapes[source] != shape:
                yield f"'{name}' has shape {reader.shapes[source]} in the file and {shape} in the model"
                return
        if self._is_expanded(name):
            yield f"'{name}' is expanded in the model, elements that share memory cannot be written: clone() it first"
            return
        stored = reader.dtypes[sources[0]]
        if stored.is_complex and not dtype.is_complex:
            yield f"'{name}' is {stored} in the file and {dtype} in the model"
            return
        if dtype.is_complex and not stored.is_complex:
            dtype = dtype.to_real()
        if len(sources) == 1 and _holds(dtype, stored):
            return
        for _, pieces in self._pieces(name, reader, sources):
            for piece, source in zip(pieces[1:], sources[1:], strict=True):
                if not torch.equal(piece.view(torch.uint8), pieces[0].view(torch.uint8)):
                    yield f"'{name}' is one tensor in the model, but '{sources[0]}' and '{source}' differ in the file"
            loss = _loss(pieces[0], dtype)
            if loss == "rounded":
                rounded.append(name)
            elif loss:
                yield f"'{name}' is {dtype} in the model, which cannot hold {loss} ({pieces[0].dtype}) of the file"

    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name in self._buffers:
            return self._buffers[name].dtype, tuple(self._buffers[name].shape)
        sharding = self.shards.shardings[self._items[name]]
        return sharding.dtype, tuple(sharding.shape)

    def _is_expanded(self, name: str) -> bool:
        """Whether elements share memory, as those of ``expand``."""
        tensor = self._buffers[name] if name in self._buffers else self.shards.params[self._items[name]]
        return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

    def _pieces(
        self, name: str, reader: files.Reader, sources: Sequence[str]
    ) -> Iterator[tuple[int | None, list[torch.Tensor]]]:
        """The item (None for a buffer) and what the file has for this rank under each name, if it holds anything."""
        if name in self._buffers:
            yield None, [reader.tensor(source) for source in sources]
            return
        item = self._items[name]
        sharding = self.shards.shardings[item]
        fragment = sharding.layout.fragments[sharding.rank]
        if fragment is not None:
            yield item, [reader.fragment(source, sharding.layout.shape, fragment) for source in sources]

    def _apart(self) -> list[str]:
        """Names of what several sets of ranks hold apart, with different bits; all ranks must call it."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        shardings = self.shards.shardings
        items = [at for at, sharding in enumerate(shardings) if not sharding.alone and apart(sharding, world)]
        if not any(share(bool(items))):
            return []
        names = list(self._items)
        sums = part_sums(self.shards, items, self.shards.pieces)
        return list(differences(share([[names[at], *sums[at]] for at in items])))

    def write(self, reader: files.Reader, state: OptimizerLoad | None, progress: files.Progress) -> None:
        """Copy this rank's pieces into the model and the optimizer."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        error, done = None, 0
        kinds = {name: self._kind(name) for name in self._found.sources}
        total = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds.values())
        total += 0 if state is None else state.total
        try:
            with (
                torch.no_grad(),
                known_engine(),
                files.reporter(progress if rank == 0 or callable(progress) else None, reader.path.name) as report,
            ):
                for name, sources in self._found.sources.items():
                    for item, (piece,) in self._pieces(name, reader, sources[:1]):
                        if item is None:
                            self._buffers[name].copy_(piece)
                        else:
                            self.shards.adapters[item].write(self.shards.params[item], "value", piece)
                    dtype, shape = kinds[name]
                    done += dtype.itemsize * torch.Size(shape).numel()
                    report(done, total)
                for nbytes in () if state is None else state.write():
                    done += nbytes
                    report(done, total)
        except Exception as caught:
            error = caught
        agree(error, everyone(), _HOST)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype holds every value of another one exactly."""
    if dtype == other or other == torch.bool:
        return True
    if dtype == torch.bool or dtype.is_complex or other.is_complex:
        return False
    if dtype.is_floating_point and other.is_floating_point:
        mine, its = torch.finfo(dtype), torch.finfo(other)
        return mine.eps <= its.eps and mine.max >= its.max and mine.tiny <= its.tiny
    if dtype.is_floating_point:
        return torch.iinfo(other).max <= 1 / torch.finfo(dtype).eps
    if other.is_floating_point:
        return False
    return torch.iinfo(dtype).min <= torch.iinfo(other).min and torch.iinfo(dtype).max >= torch.iinfo(other).max


def _loss(piece: torch.Tensor, dtype: torch.dtype) -> str:
    """What a cast would lose: nothing, ``"rounded"`` digits, or a value that the dtype cannot hold, in words."""
    cast = piece.to(dtype)
    wide = torch.float64 if piece.is_floating_point() else piece.dtype  # float8 cannot be compared
    before, after = piece.to(wide), cast.to(wide)
    different = (before != after) & ~(before.isnan() & after.isnan())
    if wide != torch.float64:  # a cast between int64 and uint64 and back is the same again
        different |= _negative(piece) != _negative(cast)
    if not bool(different.any()):
        return ""
    if piece.dtype.is_floating_point and dtype.is_floating_point:
        different &= after.isfinite() != before.isfinite()
        if not bool(different.any()):
            return "rounded"
    return str(piece[different].flatten()[0].item())


def _negative(numbers: torch.Tensor) -> torch.Tensor:
    if numbers.dtype == torch.uint64:
        return torch.zeros(numbers.shape, dtype=torch.bool)
    return numbers.to(torch.float64 if numbers.is_floating_point() else torch.int64) < 0


def _joined(problems: Sequence[str]) -> str:
    shown = 50
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "; ".join([*problems[:shown], *more])

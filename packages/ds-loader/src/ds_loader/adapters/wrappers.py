"""Loaders that wrap one DataLoader, batch for batch: Accelerate's and Fabric's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler

from ds_loader._order import Plan
from ds_loader._parts import Parts, parts_of
from ds_loader._random import seed_from_torch
from ds_loader._skip import taken_from, too_few
from ds_loader.adapters.base import Adapter, Place, is_from
from ds_loader.adapters.pytorch import DataLoaderAdapter, StatefulDataLoaderAdapter

_T = TypeVar("_T")


class Begun:
    """A loader in whose place an inner iterator stands that begins where it should.

    It begins when the wrapper asks for it: by then the wrapper has told its samplers the epoch.
    """

    def __init__(self, loader: Any, begin: Callable[[], Iterator[Any]]) -> None:
        self._loader = loader
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        # Without a state of its own: Accelerate asks for it at every batch.
        if name in ("_loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class WrapperAdapter(Adapter[_T]):
    """Drives a copy of the wrapper around an inner loader that was begun at the right batch.

    A wrapper's ``__iter__`` is a generator, which ends at an exception.
    """

    attribute: str  # where it keeps the inner loader
    epoch_count: str  # where it counts epochs
    survives = False

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        inner = getattr(loader, self.attribute)
        adapter = next(kind for kind in (StatefulDataLoaderAdapter, DataLoaderAdapter, Adapter) if kind.fits(inner))
        self._inner: Adapter[Any] = adapter(inner, parts_of(inner))
        # What was given or found below belongs to the whole.
        self._inner.parts = parts
        self.indices = getattr(self._inner, "indices", None)
        if self.indices is not None:
            self.indices.parts = parts
        self.keeps_state = self._inner.keeps_state
        self.by_index, self.plan, self.limits = self._inner.by_index, self._inner.plan, self._inner.limits
        kind = type(loader)
        self._view_kind = type(kind.__name__, (kind,), {"__setattr__": _set_on_both, "__module__": kind.__module__})
        self._skipped: int = getattr(loader, "skip_batches", 0)  # at the beginning of every epoch, by Accelerate

    @property
    def world_size(self) -> int:
        """See `Adapter.world_size`."""
        return self._inner.world_size

    @property
    def batch_size(self) -> int | None:
        """See `Adapter.batch_size`."""
        return self._inner.batch_size if self.plan is None else self.plan.batch_size

    @property
    def stream_workers(self) -> int | None:
        """See `Adapter.stream_workers`."""
        return self._inner.stream_workers

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        return iter(self._view(place, self._inner.start))

    def state(self) -> Any:
        """See `Adapter.state`."""
        return self._inner.state()

    def counted(self, own: Any) -> int | None:
        """See `Adapter.counted`."""
        counted = self._inner.counted(own)
        return None if counted is None else counted - self._skipped

    def interrupt(self) -> None:
        """See `Adapter.interrupt`."""
        self._inner.interrupt()

    def close(self) -> None:
        """See `Adapter.close`."""
        self._inner.close()

    def _view(self, place: Place, start: Callable[[Place], Iterator[Any]]) -> Any:
        """A copy of the wrapper around what ``start`` returns.

        What it notes about itself, such as Accelerate's ``end_of_dataloader``, it notes on the wrapper, too.
        """
        loader = self.loader
        # Not by copy: a wrapper's __reduce__ and __class__ may be those of what it wraps.
        view: Any = object.__new__(self._view_kind)
        changed: dict[str, Any] = {"_original": loader, self.epoch_count: place.epoch}
        if place.batch and self._skipped:
            changed["skip_batches"], place = 0, replace(place, batch=place.batch + self._skipped)
        changed[self.attribute] = Begun(getattr(loader, self.attribute), lambda: start(place))
        vars(view).update({**vars(loader), **changed})
        return view


def _set_on_both(view: Any, name: str, value: Any) -> None:
    vars(view)[name] = value
    setattr(vars(view)["_original"], name, value)


class FabricAdapter(WrapperAdapter[_T]):
    """What ``Fabric.setup_dataloaders`` returns. It calls ``set_epoch`` with a count of its own."""

    attribute = "_dataloader"
    epoch_count = "_num_iter_calls"

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        modules = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
        return any(is_from(loader, module, "_FabricDataLoader") for module in modules)


class AccelerateSkipAdapter(WrapperAdapter[_T]):
    """What Accelerate's ``skip_first_batches`` makes of a DataLoader over a stream."""

    attribute = "base_dataloader"
    epoch_count = "iteration"

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return _is_accelerate(loader, "SkipDataLoader")


class AccelerateShardAdapter(WrapperAdapter[_T]):
    """What ``Accelerator.prepare`` returns where each rank loads for itself.

    It loads one batch ahead, and at the end of an epoch its own state means the next one. So the state of a stream in a
    StatefulDataLoader is taken from there, before the batch that is loaded ahead; and an error of that batch is raised
    when its turn has come.
    """

    attribute = "base_dataloader"
    epoch_count = "iteration"
    tells_end = True

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self._ahead: _Ahead | None = None
        # On one process Accelerate makes no generator for the sampler, and no shards. On any number, states are alike.
        for sampler in parts.unseeded:
            sampler.generator = torch.Generator().manual_seed(seed_from_torch())
            parts.own.append(sampler.generator)
        parts.unseeded.clear()
        if self.plan is not None and self.plan.shard is None and isinstance(self.plan.batch_size, int):
            shards = sys.modules["accelerate.data_loader"].BatchSamplerShard
            whole = BatchSampler(self.plan.sampler, self.plan.batch_size, self.plan.drop_last)
            self.plan = self.indices.cut_by = replace(self.plan, shard=shards(whole, even_batches=False))

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return _is_accelerate(loader, "DataLoaderShard")

    def synchronize(self) -> None:
        """See `Adapter.synchronize`: all ranks' generators become as rank 0's."""
        wrapper: Any = self.loader
        if wrapper.rng_types is not None:
            sys.modules["accelerate.data_loader"].synchronize_rng_states(
                wrapper.rng_types, wrapper.synchronized_generator
            )

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        self._ahead = _Ahead(self._inner)
        view = self._view(place, self._ahead.begin)
        vars(view)["rng_types"] = None  # it is done by `synchronize`
        return _until_error(view, self._ahead)

    def state(self) -> Any:
        """See `Adapter.state`."""
        return None if self._ahead is None else self._ahead.state

    def close(self) -> None:
        """See `Adapter.close`."""
        self._ahead = None
        super().close()


class _Error:
    """An error in the place of the batch that could not be loaded."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Ahead(Iterator[Any]):
    """Keeps the state that the inner loader had before the batch that was fetched last; an error comes as a batch."""

    def __init__(self, adapter: Adapter[Any]) -> None:
        self._adapter = adapter
        self._iterator: Iterator[Any] = iter(())
        self._error: _Error | None = None
        self.state: Any = None
        self.empty = True

    def begin(self, place: Place) -> Iterator[Any]:
        self._iterator = self._adapter.start(place)
        return self

    def __next__(self) -> Any:
        if self._error is None:
            self.state = self._adapter.state()
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise
            except Exception as error:
                self._error = _Error(error)
            else:
                self.empty = False
                return batch
        self.empty = False
        return self._error


def _until_error(view: Iterable[Any], ahead: _Ahead) -> Iterator[Any]:
    for batch in view:
        if ahead.empty:  # Accelerate before 1.1 gives a None then
            return
        if type(batch) is _Error:
            raise batch.error
        yield batch


@dataclass(frozen=True)
class DispatchPlan(Plan):
    """A plan by which one rank loads for all: each gets its slice of what is loaded in one step."""

    def batches(self, rest: Sequence[Any], world_size: int, rank: int, batch_size: int | None) -> Iterator[Any]:
        """See `Plan.batches`."""
        step = (batch_size or 1) * world_size
        for samples in BatchSampler(rest, step, self.drop_last):
            size = -(-len(samples) // world_size)
            filled = samples if len(samples) % world_size == 0 else [*samples, *rest[:world_size]]
            yield filled[rank * size : (rank + 1) * size]


class AccelerateDispatcherAdapter(WrapperAdapter[_T]):
    """What ``Accelerator.prepare`` returns where rank 0 loads for all. Every rank has to iterate.

    It fails if it meets no batch, and fills up a last step with samples of the first that it meets. So it is given the
    first step of the epoch again, wherever it begins, and told to pass over it.
    """

    attribute = "base_dataloader"
    epoch_count = "iteration"
    tells_end = True

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = False
        wrapper: Any = loader
        self._world_size: int = wrapper.state.num_processes
        self._rank: int = wrapper.state.process_index
        self.in_step = self._world_size > 1
        self._per_step = 1 if wrapper.split_batches else self._world_size  # batches of the inner loader
        if self.indices is not None:
            self.indices.cut_by = None  # its batches are those of all ranks
        plan, self.plan = self.plan, None
        if plan is not None and plan.batch_size is not None and plan.drop_last == wrapper._drop_last:
            size = plan.batch_size * self._per_step // self._world_size
            self.plan = DispatchPlan(plan.sampler, self._world_size, self._rank, size, plan.drop_last, simple=False)

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return _is_accelerate(loader, "DataLoaderDispatcher")

    @property
    def world_size(self) -> int:
        """See `Adapter.world_size`."""
        return self._world_size

    @property
    def batch_size(self) -> int | None:
        """See `Adapter.batch_size`."""
        return super().batch_size if self.plan is None else self.plan.batch_size

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        view = self._view(place, self._load if self._rank == 0 else self._load_nothing)
        if place.batch:
            vars(view)["skip_batches"] = 1
        return iter(view)

    def state(self) -> Any:
        """See `Adapter.state`."""
        return None

    def _load(self, place: Place) -> Iterator[Any]:
        """The batches behind ``place.batch`` steps; before them those of the first step."""
        batches, again = place.batch * self._per_step, self._per_step if place.batch else 0
        if self.indices is None:
            iterator = self._inner.start(replace(place, batch=0))
            first = list(islice(iterator, again))
            found = len(first) + taken_from(iterator, batches - len(first))
            if place.batch and found <= batches - self._per_step:
                raise too_few(place.batch, -(-found // self._per_step))
            return chain(first, iterator)
        if self.plan is not None:  # a last step may be smaller
            samples = self.plan.handed_out(place.batch, self.plan.length - place.seen)
            batches = -(-samples // self.indices.plan.batch_size)
        else:
            batches = min(batches, len(self._inner.loader))  # type: ignore[arg-type]
        return self._inner.start(replace(place, batch=batches, again=min(again, batches)))

    def _load_nothing(self, place: Place) -> Iterator[Any]:
        """Only let the user's generators go on as they do on rank 0."""
        if self.indices is not None and self.parts.own:
            self.indices.place = replace(place, batch=0)
            for _ in self.indices:
                pass
        return iter(())


def _is_accelerate(loader: object, kind: str) -> bool:
    """Whether it is such a loader of Accelerate, and wraps another one; those of old releases iterate by themselves."""
    return is_from(loader, "accelerate.data_loader", kind) and "base_dataloader" in vars(loader)

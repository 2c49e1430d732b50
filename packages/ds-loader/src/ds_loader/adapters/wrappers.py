"""Loaders that wrap one DataLoader, batch for batch: Accelerate's and Fabric's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from ds_loader._parts import Parts, parts_of
from ds_loader.adapters.base import Adapter, Place, is_from
from ds_loader.adapters.pytorch import DataLoaderAdapter, StatefulDataLoaderAdapter

_T = TypeVar("_T")


class Begun:
    """A loader in whose place the inner iterator stands that was begun where it should."""

    def __init__(self, loader: Any, iterator: Iterable[Any]) -> None:
        self._loader = loader
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterator)

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

    attribute: str
    survives = False

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        inner = getattr(loader, self.attribute)
        kind = next(kind for kind in (StatefulDataLoaderAdapter, DataLoaderAdapter, Adapter) if kind.fits(inner))
        self._inner: Adapter[Any] = kind(inner, parts_of(inner))
        # What was given or found below belongs to the whole.
        self._inner.parts = parts
        self.indices = getattr(self._inner, "indices", None)
        if self.indices is not None:
            self.indices.parts = parts
        self.keeps_state = False  # of the wrapper
        self.by_index, self.plan, self.limits = self._inner.by_index, self._inner.plan, self._inner.limits

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
        return self._iterate(self._inner.start(place), place)

    def state(self) -> Any:
        """See `Adapter.state`."""
        return None

    def interrupt(self) -> None:
        """See `Adapter.interrupt`."""
        self._inner.interrupt()

    def close(self) -> None:
        """See `Adapter.close`."""
        self._inner.close()

    def _iterate(self, iterator: Iterable[Any], place: Place) -> Iterator[_T]:
        view = object.__new__(type(self.loader))  # its __reduce__ and __class__ may be those of what it wraps
        vars(view).update(vars(self.loader))
        vars(view)[self.attribute] = Begun(getattr(self.loader, self.attribute), iterator)
        self._tell_epoch(view, place.epoch)
        return iter(view)

    def _tell_epoch(self, view: Any, epoch: int) -> None:
        """Set the wrapper's own count of epochs."""


class FabricAdapter(WrapperAdapter[_T]):
    """What ``Fabric.setup_dataloaders`` returns. It calls ``set_epoch`` with a count of its own."""

    attribute = "_dataloader"

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        modules = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
        return any(is_from(loader, module, "_FabricDataLoader") for module in modules)

    def _tell_epoch(self, view: Any, epoch: int) -> None:
        view._num_iter_calls = epoch


class AccelerateShardAdapter(WrapperAdapter[_T]):
    """What ``Accelerator.prepare`` returns where each rank loads for itself.

    It loads one batch ahead, and at the end of an epoch its own state means the next one. So the state of a stream in a
    StatefulDataLoader is taken from there, before the batch that is loaded ahead.
    """

    attribute = "base_dataloader"

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = self._inner.keeps_state
        self._states_ahead: Any = None

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return is_from(loader, "accelerate.data_loader", "DataLoaderShard")

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        behind = _OneBehind(self._inner, self._inner.start(place))
        self._states_ahead = behind
        return self._iterate(behind, place)

    def state(self) -> Any:
        """See `Adapter.state`."""
        return None if self._states_ahead is None else self._states_ahead.state

    def counted(self, own: Any) -> int | None:
        """See `Adapter.counted`."""
        return self._inner.counted(own)

    def _tell_epoch(self, view: Any, epoch: int) -> None:
        view.iteration = epoch


class _OneBehind(Iterator[Any]):
    """Keeps the state that the inner loader had before the batch that was fetched ahead."""

    def __init__(self, adapter: Adapter[Any], iterator: Iterator[Any]) -> None:
        self._adapter = adapter
        self._iterator = iterator
        self.state: Any = None

    def __next__(self) -> Any:
        self.state = self._adapter.state()
        return next(self._iterator)


class AccelerateDispatcherAdapter(WrapperAdapter[_T]):
    """What ``Accelerator.prepare`` returns where rank 0 loads for all. Every rank has to iterate."""

    attribute = "base_dataloader"

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        ranks = loader.state.num_processes  # type: ignore[attr-defined]
        splits = bool(loader.split_batches)  # type: ignore[attr-defined]
        self._per_step = 1 if splits else ranks  # batches of the inner loader
        if self.plan is not None and self.plan.batch_size is not None:
            size = self.plan.batch_size // ranks if splits else self.plan.batch_size
            self.plan = replace(self.plan, world_size=ranks, batch_size=size)
        self._world_size: int = ranks

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return is_from(loader, "accelerate.data_loader", "DataLoaderDispatcher")

    @property
    def world_size(self) -> int:
        """See `Adapter.world_size`."""
        return self._world_size

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        inner = replace(place, batch=place.batch * self._per_step)
        if self.by_index:
            return self._iterate(self._inner.start(inner), place)
        return self._iterate(_Lazily(lambda: self._inner.start(inner)), place)

    def _tell_epoch(self, view: Any, epoch: int) -> None:
        view.iteration = epoch


class _Lazily(Iterator[Any]):
    """Begins when the first batch is asked for: ranks that never ask load nothing."""

    def __init__(self, begin: Any) -> None:
        self._begin = begin
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._begin()
        return next(self._iterator)

"""PyTorch's ``DataLoader``, and torchdata's ``StatefulDataLoader``, which is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from inspect import isgeneratorfunction
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ds_loader._parts import Parts
from ds_loader._random import PrivatelyRandom, mixed
from ds_loader.adapters.base import Adapter, Place, has_state, is_from, shares_epoch, shut_down
from ds_loader.adapters.indices import EpochSampler

_T = TypeVar("_T")


class DataLoaderAdapter(Adapter[_T]):
    """Drives a copy of a ``DataLoader``, with its dataset and samplers, whose indices begin where they should.

    A map-style one is begun at a batch by its indices. Of a stream, the earlier batches are loaded and dropped, unless
    the dataset is one of Hugging Face's, read in this process, which goes on by its own state.
    """

    def __init__(self, loader: DataLoader[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = False
        self._view = copy.copy(loader)
        vars(self._view)["_iterator"] = None
        if "_initial_iter_for_state_dict" in vars(self._view):  # torchdata's: it was asked for a state before
            vars(self._view)["_initial_iter_for_state_dict"] = False
        self._map_style = not isinstance(loader.dataset, IterableDataset)
        if self._map_style:
            self._take_indices()
        else:
            self.survives = not isgeneratorfunction(getattr(type(loader.dataset), "__iter__", None))
        self._hub_stream = not self._map_style and loader.num_workers == 0 and keeps_its_place(loader.dataset)
        self.keeps_state = self._hub_stream
        hears = [part for part in parts_of_dataset(loader, parts) if callable(getattr(part, "set_epoch", None))]
        shared = all(shares_epoch(part) for part in hears)
        if loader.persistent_workers and not shared:
            vars(self._view)["persistent_workers"] = False  # new ones for each epoch, with datasets that heard of it
        self.workers = loader.num_workers > 0 and not self._view.persistent_workers and not hears
        if not getattr(loader, "in_order", True) and loader.num_workers > 1:
            self.limits.append(
                "cannot resume exactly, because in_order=False hands out batches as its workers finish them; pass "
                "in_order=True"
            )
        if not self._map_style:
            self._note_limits()

    @classmethod
    def fits(cls, loader: object) -> bool:
        """Any that draws indices first and loads by them, the way PyTorch's own does."""
        return isinstance(loader, DataLoader) and is_plain(loader)

    @property
    def stream_workers(self) -> int | None:
        """See `Adapter.stream_workers`."""
        return None if self._map_style else self._view.num_workers

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        self._cursors.enter(place)
        # Seeds of workers are drawn whenever they start, which they do at other times in a run that was resumed.
        self._view.generator = torch.Generator(device=_default_device()).manual_seed(mixed(place.seed, place.epoch, -4))
        if self.indices is not None:
            self.indices.place = place
            return iter(self._view)
        if self._hub_stream and place.own is not None:
            self._view.dataset.load_state_dict(place.own)  # type: ignore[attr-defined]
            return PrivatelyRandom(self._view, place.streams())
        iterator = PrivatelyRandom(self._view, place.streams())
        iterator.drop(place.batch, place.left_out)
        return iterator.iterator if self._view.num_workers > 0 else iterator  # workers have generators of their own

    def state(self) -> Any:
        """See `Adapter.state`."""
        return self._view.dataset.state_dict() if self._hub_stream else None  # type: ignore[attr-defined]

    def close(self) -> None:
        """See `Adapter.close`."""
        shut_down(self._view)

    def _take_indices(self) -> None:
        name = "sampler" if self._view.batch_sampler is None else "batch_sampler"
        inner: Any = getattr(self._view, name)
        batched = name == "batch_sampler" or isinstance(inner, BatchSampler)
        self.indices = EpochSampler(inner, self.parts, batched=batched)
        vars(self._view)[name] = self.indices  # through __dict__: a DataLoader refuses to have it set
        self.plan = self.indices.plan
        self.by_index = True


class StatefulDataLoaderAdapter(DataLoaderAdapter[_T]):
    """A ``StatefulDataLoader``: by its own state where its dataset keeps one, else like a ``DataLoader``.

    Its own way without a state of the dataset is to load all earlier batches. So it is done here where one worker has
    come to its end before the others.
    """

    def __init__(self, loader: DataLoader[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = not self._map_style or has_state(loader.dataset)
        self._hub_stream = False
        if self.keeps_state and not hasattr(loader, "in_order"):
            self.limits.append("cannot resume exactly, because torchdata before 0.11 cannot: install a newer one")
        if self.keeps_state and keeps_buffer(loader.dataset):
            self.keeps_state = False  # its state lacks what is in the buffer
        if self.keeps_state:
            self.workers = False
            self.by_index = False

    @classmethod
    def fits(cls, loader: object) -> bool:
        """Also subclasses that make a state of their own of it, such as torchtitan's."""
        kind = "StatefulDataLoader"
        return is_from(loader, "torchdata.stateful_dataloader.stateful_dataloader", kind) and is_plain(loader)

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        if place.own is not None:
            self._view.load_state_dict(place.own)  # type: ignore[attr-defined]
            # Its own state passes over the indices.
            place = Place(place.seed, place.epoch, run=place.run)
        return super().start(place)

    def state(self) -> Any:
        """See `Adapter.state`."""
        if not self.keeps_state:
            return None
        view: Any = self._view
        library = next(kind for kind in type(view).__mro__ if kind.__module__.startswith("torchdata."))
        own: Any = library.state_dict(view)  # type: ignore[attr-defined]  # a subclass may have packed it
        exact = (has_state(view.dataset) or _mentions_iterator(own)) and not _has_ended_worker(own)
        return view.state_dict() if exact else None

    def counted(self, own: Any) -> int | None:
        """See `Adapter.counted`."""
        if not isinstance(own, dict):
            return None
        if isinstance(own.get("_num_yielded"), int):
            return own["_num_yielded"]  # type: ignore[no-any-return]
        snapshot = own.get("_snapshot")
        if isinstance(snapshot, dict) and isinstance(own.get("_steps_since_snapshot"), int):
            return snapshot.get("_snapshot_step", 0) + own["_steps_since_snapshot"]  # type: ignore[no-any-return]
        return None


def is_plain(loader: object) -> bool:
    """Whether a loader iterates the way PyTorch's or torchdata's own does."""
    kinds = [
        kind for kind in type(loader).__mro__ if kind.__module__.startswith(("torch.utils.data", "torchdata.stateful"))
    ]
    return bool(kinds) and all(  # there may be none: Accelerate's wrappers lie about their __class__
        getattr(type(loader), name) is getattr(kinds[0], name)
        for name in ("__iter__", "_get_iterator", "_index_sampler")
    )


def parts_of_dataset(loader: DataLoader[Any], parts: Parts) -> list[Any]:
    """Those parts that are datasets."""
    return [part for part in parts.found if part is loader.dataset or isinstance(part, torch.utils.data.Dataset)]


def keeps_its_place(dataset: object) -> bool:
    """Whether it is a stream of Hugging Face that resumes exactly by its own state."""
    return is_from(dataset, "datasets.iterable_dataset", "IterableDataset") and not keeps_buffer(dataset)


def keeps_buffer(dataset: object) -> bool:
    """Whether a stream of Hugging Face has a shuffle buffer, whose content is not in its state."""
    pending, seen = [getattr(dataset, "_ex_iterable", None)], 0
    while pending and seen < 1000:
        stage, seen = pending.pop(), seen + 1
        if "BufferShuffled" in type(stage).__name__:
            return True
        if stage is not None:
            pending += [getattr(stage, "ex_iterable", None), *getattr(stage, "ex_iterables", [])]
    return False


def _mentions_iterator(own: Any) -> bool:
    """Whether the state of a StatefulDataLoader holds one of the dataset's iterator."""
    if isinstance(own, dict):
        return own.get("dataset_iter_state") is not None or any(_mentions_iterator(value) for value in own.values())
    return False


def _has_ended_worker(own: Any) -> bool:
    """Whether a worker has come to the end of its share, which it would begin again: its state does not tell."""
    snapshot = own.get("_snapshot") if isinstance(own, dict) else None
    workers = snapshot.get("_worker_snapshots") or {} if isinstance(snapshot, dict) else {}
    return any((worker.get("fetcher_state") or {}).get("fetcher_ended") for worker in workers.values())


def _default_device() -> torch.device:
    """Where ``torch.empty`` makes a tensor: a generator has to be there, too."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device

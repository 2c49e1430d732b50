"""How any iterable is begun at a batch of an epoch; the adapters of libraries refine it."""

from __future__ import annotations

import copy
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Generic, TypeVar

import torch

from ds_loader._order import Plan
from ds_loader._parts import Parts
from ds_loader._random import PrivatelyRandom, PrivateStreams
from ds_loader._skip import drop

_T = TypeVar("_T")
# Their order is what it is, they run no code of anybody else, and they can be begun again.
_SEQUENCES = (list, tuple, range, str, bytes, deque)


@dataclass
class Run:
    """What becomes known while an epoch is iterated.

    Attributes:
        first: (rank, checksum) of this rank's first batch of indices.
        exhausted: whether all indices have been drawn; batches of the last ones may still be on their way.
    """

    first: tuple[int, int] | None = None
    exhausted: bool = False


@dataclass(frozen=True)
class Place:
    """Where an epoch is begun.

    Attributes:
        seed, epoch: private streams of random numbers follow from them.
        batch: how many batches come before, on this rank.
        seen: how many samples come before those, on all ranks: handed out on another number of ranks.
        own: the loader's own state at that batch, or None.
        first: what `Run.first` has to become, or None.
        left_out: how many of the batches before it were left out after errors.
        cut: the number of ranks and the batch size that cut that first batch.
        run: where to note what becomes known.
        again: how many of the first batches come once more, before the others.
    """

    seed: int
    epoch: int
    batch: int = 0
    seen: int = 0
    own: Any = None
    first: tuple[int, int] | None = None
    cut: tuple[int, int | None] = (1, None)
    left_out: int = 0
    run: Run = field(default_factory=Run)
    again: int = 0

    def streams(self) -> PrivateStreams:
        """Streams as they are when the epoch begins."""
        return PrivateStreams(self.seed, self.epoch)


class Adapter(Generic[_T]):
    """Begins a loader anew. This one takes any iterable.

    Args:
        loader: as the user gave it.
        parts: what it is made of.

    Attributes:
        by_index: whether `start` passes over batches without loading them.
        plan: how its order is cut among ranks; None where that is not known.
        indices: the `EpochSampler` that draws its indices; None where it has none.
        limits: sentences that say what cannot be done, for a warning.
        keeps_state: whether the loader has a state of its own by which it resumes exactly.
        survives: whether its iterators go on after an exception.
        workers: whether the next epoch's workers may start while this epoch is not over.
        tells_end: whether the loader says, for others to read, if the batch handed out last is the epoch's last; so
            none may be fetched ahead of it.
        in_step: whether all ranks iterate together, by collectives of the library; so none can try a batch again alone.
    """

    by_index = False
    plan: Plan | None = None
    indices: Any = None
    survives = True
    workers = False
    tells_end = False
    in_step = False

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        self.loader = loader
        self.parts = parts
        self.limits: list[str] = []
        self.keeps_state = has_state(loader)
        # A loader's own place is a part of its state.
        self._cursors = Cursors(part for part in parts.found if not self._is_loader(part))
        if type(self) is Adapter:
            self._note_limits()

    @classmethod
    def fits(cls, loader: object) -> bool:
        """Whether this adapter is for that loader."""
        return True

    @property
    def name(self) -> str:
        """The loader's class."""
        return type(self.loader).__name__

    @property
    def world_size(self) -> int:
        """Among how many ranks an epoch is divided."""
        return self.plan.world_size if self.plan is not None else world_size_of(self.parts)

    @property
    def batch_size(self) -> int | None:
        """Samples of one rank in one batch, where that is known."""
        if self.plan is not None:
            return self.plan.batch_size
        size = getattr(self.loader, "batch_size", None)
        return size if isinstance(size, int) else None

    @property
    def stream_workers(self) -> int | None:
        """Among how many worker processes a stream is divided; None where workers do not matter to the order."""
        return None

    def samples(self, batch: int, seen: int) -> int | None:
        """How many samples of an epoch all ranks together have, after so many batches each behind ``seen`` samples.

        None where another number of ranks could not go on behind them.
        """
        if self.plan is None or self.keeps_state:
            return None
        return seen + self.plan.handed_out(batch, self.plan.length - seen)

    def size(self) -> int | None:
        """Samples in one epoch; batches where the order is not known; None where that is not known either."""
        return self.length() if self.plan is None else self.plan.length

    def length(self) -> int | None:
        """Batches in one epoch, or None."""
        if not isinstance(self.loader, Sized):
            return None
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):  # a DataLoader over a stream has a length if the stream has one
            return None

    def synchronize(self) -> None:
        """Give the generators of all ranks one state, if the library does so before it iterates."""

    def start(self, place: Place) -> Iterator[_T]:
        """Iterate from that place on.

        Raises:
            LoaderStateError: the loader has fewer batches than come before; or, at the first batch, other indices.
        """
        self._cursors.enter(place)
        for part in self.parts.found:
            if isinstance(part, torch.utils.data.DataLoader) and outlives_epochs(part):
                shut_down(part)
        if place.own is not None:
            self.loader.load_state_dict(place.own)  # type: ignore[attr-defined]
            return PrivatelyRandom(self.loader, place.streams())
        if isinstance(self.loader, _SEQUENCES):
            rest = iter(self.loader)
            drop(rest, place.batch)
            return rest
        iterator = PrivatelyRandom(self.loader, place.streams())
        iterator.drop(place.batch, place.left_out)
        return iterator

    def state(self) -> Any:
        """The loader's own state behind the batch handed out last; None if it has none that resumes exactly."""
        return self.loader.state_dict() if self.keeps_state else None  # type: ignore[attr-defined]

    def counted(self, own: Any) -> int | None:
        """How many batches of this epoch were handed out by the loader's own state, where that says so."""
        return None

    def interrupt(self) -> None:
        """The iterator is given up: stop what reads ahead for it in this process, and would draw from generators."""
        self._cursors.interrupt()

    def close(self) -> None:
        """End worker processes that outlive an iterator."""
        shut_down(self.loader)

    def _is_loader(self, part: object) -> bool:
        """Whether a part is a loader whose own place `start` sets."""
        return isinstance(part, torch.utils.data.DataLoader) or (part is self.loader and type(self) is not Adapter)

    @property
    def _ordered_by(self) -> str:
        """The class that orders the batches."""
        return type(getattr(self.loader, "dataset", self.loader)).__name__

    def _note_limits(self) -> None:
        if isinstance(self.loader, _SEQUENCES) or is_once_only(self.loader):
            return
        if self.parts.live:
            self.limits.append(
                "cannot resume exactly, because it holds an iterator that was begun before it came here, whose order "
                "depends on nothing that is known here"
            )
        knows = any(True for _ in self.parts.epoch_setters()) or self.parts.own or self.parts.unseeded
        if not knows and not self.keeps_state:
            self.limits.append(
                f"the order of {self._ordered_by} cannot be changed from here: it has no set_epoch and no generator "
                "(what it draws from the global generators of torch, random and numpy does change with every epoch)"
            )


class Cursors:
    """The places of objects that keep one of their own, such as a sampler with ``state_dict`` and ``load_state_dict``.

    Args:
        owners: the objects; those without both are passed over.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        owners = [owner for owner in owners if has_state(owner)]
        self._streams = [owner for owner in owners if is_from(owner, "datasets.iterable_dataset", "IterableDataset")]
        self._owners = [owner for owner in owners if owner not in self._streams]
        self._places: list[Any] | None = None
        self._epoch: int | None = None  # the one begun last, unless it was left in the middle

    def enter(self, place: Place) -> bool:
        """Make an epoch begin at its beginning.

        Returns:
            Whether it follows the one before. If not, that one may have left its place in the middle, and all are put
            where they were at the first call.
        """
        follows, self._epoch = self._epoch is not None and self._epoch == place.epoch - 1, place.epoch
        if place.own is None:
            for stream in self._streams:  # it goes on at a state that it was given in every iteration of that epoch
                stream.load_state_dict(None)
        if self._places is None:
            self._places = [_place_of(owner) for owner in self._owners]
        elif not follows:
            for owner, at in zip(self._owners, self._places, strict=True):
                if at is not None:
                    owner.load_state_dict(copy.deepcopy(at))
        return follows

    def interrupt(self) -> None:
        """The epoch was left in the middle."""
        self._epoch = None


def _place_of(owner: Any) -> Any:
    try:
        return copy.deepcopy(owner.state_dict())
    except TypeError:  # it wants arguments
        return None


def has_state(part: object) -> bool:
    """Whether it has the methods of an object that keeps its place."""
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def checksum(batch: Any) -> int:
    """Of the indices of a batch."""
    return zlib.crc32(repr(list(batch) if isinstance(batch, (list, tuple)) else batch).encode())


def world_size_of(parts: Parts) -> int:
    """Among how many ranks the loader says that an epoch is divided; all ranks that there are if it does not say."""
    for part in parts.found:
        for name in ("num_replicas", "num_processes"):
            size = getattr(part, "__dict__", {}).get(name)
            if isinstance(size, int) and size > 0:
                return size
        size = getattr(getattr(part, "_distributed", None), "world_size", None)  # split_dataset_by_node
        if isinstance(size, int):
            return size
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def outlives_epochs(loader: torch.utils.data.DataLoader[Any]) -> bool:
    """Whether it has persistent workers, whose copies of a stream do not hear of the next epoch."""
    hears = callable(getattr(loader.dataset, "set_epoch", None)) and not shares_epoch(loader.dataset)
    return loader.persistent_workers and hears and getattr(loader, "iterator", None) is None


def shares_epoch(dataset: object) -> bool:
    """Whether it keeps the epoch in memory that workers share, as streams of Hugging Face do; not of old releases."""
    epoch = getattr(dataset, "_epoch", None)
    return isinstance(epoch, torch.Tensor) and bool(epoch.is_shared())  # type: ignore[no-untyped-call]


def shut_down(owner: object) -> None:
    """End the workers of an iterator, or of the one that a loader keeps."""
    for candidate in (owner, getattr(owner, "iterator", None), getattr(owner, "__dict__", {}).get("_iterator")):
        stop = getattr(candidate, "_shutdown_workers", None)
        if callable(stop):
            stop()
    if isinstance(getattr(owner, "__dict__", None), dict) and "_iterator" in vars(owner):
        vars(owner)["_iterator"] = None


def is_once_only(loader: object) -> bool:
    """Whether it is a generator or an iterator of Python's own, which have one epoch."""
    return isinstance(loader, GeneratorType) or (
        isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools")
    )


def is_from(loader: object, module: str, name: str) -> bool:
    """Whether an object is of a class of a library, or of a subclass of it; the library is not imported for that."""
    library = sys.modules.get(module)
    kind = getattr(library, name, None)
    return isinstance(kind, type) and issubclass(type(loader), kind)

"""How any iterable is begun at a batch of an epoch; the adapters of libraries refine it."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
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
        run: where to note what becomes known.
        again: how many of the first batches come once more, before the others.
    """

    seed: int
    epoch: int
    batch: int = 0
    seen: int = 0
    own: Any = None
    first: tuple[int, int] | None = None
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
    """

    by_index = False
    plan: Plan | None = None
    indices: Any = None
    survives = True
    workers = False
    tells_end = False

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        self.loader = loader
        self.parts = parts
        self.limits: list[str] = []
        self.keeps_state = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
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
        if place.own is not None:
            self.loader.load_state_dict(place.own)  # type: ignore[attr-defined]
            return PrivatelyRandom(self.loader, place.streams())
        if isinstance(self.loader, _SEQUENCES):
            rest = iter(self.loader)
            drop(rest, place.batch)
            return rest
        iterator = PrivatelyRandom(self.loader, place.streams())
        iterator.drop(place.batch)
        return iterator

    def state(self) -> Any:
        """The loader's own state behind the batch handed out last; None if it has none that resumes exactly."""
        return self.loader.state_dict() if self.keeps_state else None  # type: ignore[attr-defined]

    def counted(self, own: Any) -> int | None:
        """How many batches of this epoch were handed out by the loader's own state, where that says so."""
        return None

    def close(self) -> None:
        """End worker processes that outlive an iterator."""
        shut_down(self.loader)

    @property
    def _ordered_by(self) -> str:
        """The class that orders the batches."""
        return type(getattr(self.loader, "dataset", self.loader)).__name__

    def _note_limits(self) -> None:
        if isinstance(self.loader, _SEQUENCES):
            return
        if self.parts.live and isinstance(self.loader, torch.utils.data.DataLoader):
            self.limits.append(
                "cannot resume exactly, because it holds an iterator that was begun before it came here, whose order "
                "depends on nothing that is known here"
            )
        knows = any(True for _ in self.parts.epoch_setters()) or self.parts.own or self.parts.given
        if not knows and not self.keeps_state:
            self.limits.append(
                f"the order of {self._ordered_by} cannot be changed from here: it has no set_epoch and no generator "
                "(what it draws from the global generators of torch, random and numpy does change with every epoch)"
            )


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


def shut_down(owner: object) -> None:
    """End the workers of an iterator, or of the one that a loader keeps."""
    for candidate in (owner, getattr(owner, "iterator", None), getattr(owner, "__dict__", {}).get("_iterator")):
        stop = getattr(candidate, "_shutdown_workers", None)
        if callable(stop):
            stop()
    if isinstance(getattr(owner, "__dict__", None), dict) and "_iterator" in vars(owner):
        vars(owner)["_iterator"] = None


def is_from(loader: object, module: str, name: str) -> bool:
    """Whether an object is of a class of a library, or of a subclass of it; the library is not imported for that."""
    library = sys.modules.get(module)
    kind = getattr(library, name, None)
    return isinstance(kind, type) and issubclass(type(loader), kind)

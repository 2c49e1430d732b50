"""``RepeatingLoader``: a loader that never ends, reshuffles every epoch, and resumes exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import GeneratorType
from typing import Any, Generic, TypeVar

from ds_loader._parts import epoch_setters, own_generators, parts_of, separate_worker_seeds
from ds_loader._skip import iter_from
from ds_loader._state import Position
from ds_loader.errors import EmptyLoaderError, OneShotLoaderError

__all__ = ["RepeatingLoader"]

_T = TypeVar("_T")
_LOG = logging.getLogger("ds.loader")


class RepeatingLoader(Generic[_T]):
    """An endless iterator over a loader, one epoch after the other.

    Before each epoch ``set_epoch`` is called on the loader, its batch sampler, that one's sampler, its sampler and its
    dataset, as far as they have it and on each object once. Nothing here communicates: every rank starts its next
    epoch by itself.

    Args:
        loader: anything that can be iterated more than once: a ``DataLoader``, a list, an object with ``__iter__``.
            A random sampler of PyTorch without a generator is given one, seeded from torch's global generator; a
            ``DataLoader`` that shares its generator with its sampler is given a copy, for worker seeds. A loader with
            ``state_dict`` and ``load_state_dict``, such as torchdata's ``StatefulDataLoader``, resumes by them.

    Attributes:
        loader: as given.

    Raises:
        TypeError: ``loader`` cannot be iterated.
        OneShotLoaderError: (a TypeError) it can be iterated once only.

    Example:
        >>> from ds_loader import RepeatingLoader
        >>> batches = RepeatingLoader(["a", "b"])
        >>> [next(batches) for _ in range(3)], batches.epoch, len(batches)
        (['a', 'b', 'a'], 1, 2)
    """

    def __init__(self, loader: Iterable[_T]) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(f"loader must be iterable, such as a DataLoader or a list, not {type(loader).__name__}")
        if isinstance(loader, GeneratorType) or _is_builtin_iterator(loader):
            raise OneShotLoaderError(
                f"loader is a {type(loader).__name__}, which can be iterated only once: pass the DataLoader or list "
                "behind it, or an object whose __iter__ starts anew at every call"
            )
        self.loader = loader
        self._parts = parts_of(loader)
        self._stateful = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
        separate_worker_seeds(loader)
        self._generators = own_generators(self._parts)
        self._iterator: Iterator[_T] | None = None
        self._position = Position()
        self._resumed: Position | None = None  # where to go on; not begun yet
        self._any = False  # whether the loader ever gave a batch

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch handed out last."""
        return self._position.epoch

    @property
    def batch(self) -> int:
        """How many batches of this epoch have been handed out."""
        return self._position.batch

    def __len__(self) -> int:
        """The number of batches in one epoch.

        Raises:
            TypeError: the loader does not know it.
        """
        if not isinstance(self.loader, Sized):
            raise TypeError(f"the loader ({type(self.loader).__name__}) has no length, so an epoch has none")
        return len(self.loader)

    def __bool__(self) -> bool:
        return True  # not the length: the loader may have none

    def __iter__(self) -> RepeatingLoader[_T]:
        return self

    def __next__(self) -> _T:
        """The next batch; after the last of an epoch the first of the next.

        An exception that the loader raises is passed on, and the next call tries that batch again.

        Raises:
            EmptyLoaderError: the loader gave no batch.
            OneShotLoaderError: it gave some before, but none when it was iterated again.
            LoaderStateError: the state that was loaded does not fit the data.
        """
        while True:
            if self._iterator is None:
                self._iterator = self._begin()
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
                self._end_epoch()
                continue
            except Exception:
                if not self._stateful:  # the iterator may be broken: begin a new one at this batch
                    self._iterator, self._resumed = None, self._position
                raise
            self._position = Position(self.epoch, self.batch + 1, self._position.generators)
            self._any = True
            return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: enough to go on with exactly the next batch, in this process or another.

        Ranks have states of their own; each saves and loads its own.

        Returns:
            A new dict of numbers and tensors (and of what the loader's own ``state_dict`` holds).
        """
        if self._resumed is not None:
            return copy.deepcopy(self._resumed.to_dict())
        if self._iterator is None:  # at the very beginning
            self._position = Position(self.epoch, self.batch, self._states())
        own = self.loader.state_dict() if self._stateful else None  # type: ignore[attr-defined]
        return {**self._position.to_dict(), "loader": copy.deepcopy(own)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, with the same data, batch size and number of ranks.

        Earlier batches of that epoch are skipped at the next call of ``next``: by their indices for a plain map-style
        ``DataLoader``, by loading and dropping them for other sources without a state of their own.

        Raises:
            LoaderStateError: a key or value is wrong, or the state is of another kind of loader. Nothing was changed.
        """
        position = Position.from_dict(state_dict, generators=len(self._generators), stateful=self._stateful)
        if self._stateful:
            self.loader.load_state_dict(copy.deepcopy(position.loader))  # type: ignore[attr-defined]
        self._iterator = None
        self._position = self._resumed = position

    def _begin(self) -> Iterator[_T]:
        """Start the epoch at hand, from the batch at hand."""
        for set_epoch in epoch_setters(self._parts):
            set_epoch(self.epoch)
        if self._resumed is None:
            self._position = Position(self.epoch, self.batch, self._states())
        else:
            for generator, state in zip(self._generators, self._resumed.generators, strict=True):
                generator.set_state(state)
        iterator = iter_from(self.loader, 0 if self._stateful else self.batch)
        self._resumed = None
        return iterator

    def _end_epoch(self) -> None:
        if self.batch == 0 and not self._any:
            raise EmptyLoaderError(
                f"the loader ({type(self.loader).__name__}) gave no batch in epoch {self.epoch}: is the dataset, or "
                "this rank's share of it, empty, or smaller than one batch with drop_last=True?"
            )
        if self.batch == 0:
            raise OneShotLoaderError(
                f"the loader ({type(self.loader).__name__}) gave batches before, but none in epoch {self.epoch}: its "
                "__iter__ must start anew at every call"
            )
        _LOG.debug("epoch %d ended after %d batches", self.epoch, self.batch)
        self._position = Position(self.epoch + 1)

    def _states(self) -> tuple[Any, ...]:
        return tuple(generator.get_state() for generator in self._generators)


def _is_builtin_iterator(loader: object) -> bool:
    return isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools")

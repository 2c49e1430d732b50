"""The epoch at hand: its iterator, what was noted when it began, and what stands between it and the consumer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any, TypeVar

from ds_loader._device import OneAhead
from ds_loader.adapters import Run

_T = TypeVar("_T")


class Epoch:
    """An epoch that is being iterated."""

    def __init__(self, epoch: int, raw: Iterator[Any], states: tuple[Any, ...], run: Run) -> None:
        self.epoch = epoch
        self.raw = raw  # of the loader
        self.states = states  # of the user's generators when it began
        self.run = run
        self.ahead: OneAhead | None = None
        self.batches: Iterator[Any] = raw  # as they are handed out
        self.begun_at = 0  # batches before it
        self.until: int | None = None  # where it ends for all ranks


class Only(Iterator[_T]):
    """Asks for the next batch and nothing else; some iterators begin anew when ``iter`` is called on them."""

    def __init__(self, iterator: Iterator[_T]) -> None:
        self._iterator = iterator

    def __next__(self) -> _T:
        return next(self._iterator)


class OutOfStep(Iterator[Any]):
    """Stands in for an iterator that ranks went through together, until one of them failed."""

    def __next__(self) -> Any:
        raise RuntimeError(
            "the ranks are out of step, since loading a batch failed on one of them: load a state on all of them"
        )


class Watched(Iterator[_T]):
    """Calls a function once, when all indices of the epoch have been drawn."""

    def __init__(self, iterator: Iterator[_T], run: Run, method: weakref.WeakMethod[Callable[[], None]]) -> None:
        self._iterator, self._run, self._method = iterator, run, method
        self._called = False

    def __next__(self) -> _T:
        batch = next(self._iterator)
        if self._run.exhausted and not self._called:
            self._called = True
            call = self._method()
            if call is not None:
                call()
        return batch


def ended_by_error(raw: Any) -> bool:
    """Whether an iterator gives nothing after an exception: it is a generator, stands around one, or a worker died."""
    if any(not worker.is_alive() for worker in getattr(raw, "_workers", ())):
        return True
    inner = getattr(raw, "iterator", raw)
    stream = getattr(getattr(inner, "_dataset_fetcher", None), "dataset_iter", None)  # of a DataLoader without workers
    return any(isinstance(iterator, GeneratorType) for iterator in (raw, inner, stream))

"""Loops by hand, which say what a RepeatingLoader has to hand out, and stops in it."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from ds_loader import RepeatingLoader
from loops import plain
from torch.utils.data import IterableDataset, Sampler

Batches = list[tuple[int, Any]]  # (epoch, batch)


class Stream(IterableDataset[int]):
    """As many samples as there are, in order; each says its epoch, if the stream hears of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter([100 * self.epoch + n for n in range(self.size)])


class HearingStream(Stream):
    """A stream that is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class GeneratorStream(Stream):
    """A stream that shuffles by a generator of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=self.generator).tolist())


class KeepingStream(HearingStream):
    """A stream that keeps its place."""

    at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.size:
            self.at += 1
            yield 100 * self.epoch + self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class GlobalSampler(Sampler[int]):
    """Draws its order from all of the global generators."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        order = random.sample(range(self.size), self.size)
        order = [order[place] for place in torch.randperm(self.size).tolist()]
        return iter([order[place] for place in np.random.permutation(self.size).tolist()])

    def __len__(self) -> int:
        return self.size


def may_have_workers() -> None:
    """Let a rank of `run_ranks` start workers, which a daemon may not."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def seed_all(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def by_hand(loader: Iterable[Any], epochs: int, set_epoch: Callable[[int], object] | None = None) -> Batches:
    """What a loop over a fresh loader gives."""
    out = []
    for epoch in range(epochs):
        if set_epoch is not None:
            set_epoch(epoch)
        out += [(epoch, plain(batch)) for batch in loader]
    return out


def take(batches: RepeatingLoader[Any], count: int) -> Batches:
    """The next batches."""
    return [(batches.epoch, plain(batch)) for batch in (next(batches) for _ in range(count))]


def rest_of_epoch(batches: RepeatingLoader[Any], epoch: int = 0) -> list[int]:
    """The samples that are left of an epoch."""
    out: list[int] = []
    while True:
        batch = next(batches)
        if batches.epoch != epoch:
            return out
        out += plain(batch)


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a file; JSON, unless the loader has a state of its own."""
    return json.loads(json.dumps(state)) if state["loader"] is None else state


def require_resumes(make: Callable[[int], Iterable[Any]], want: Batches, stops: Iterable[int], **options: Any) -> None:
    """After every stop, and after another one, the batches are those of the run that never stopped.

    Args:
        make: a fresh loader, after the global generators were seeded by its argument.
        want: the batches of all epochs.
        stops: after how many batches.
        options: of `RepeatingLoader`.
    """
    for stop in stops:
        first = RepeatingLoader(make(0), **options)
        assert take(first, stop) == want[:stop]
        second = RepeatingLoader(make(1), **options)
        second.load_state_dict(stored(first.state_dict()))
        assert take(second, 2) == want[stop : stop + 2], f"after {stop}"
        third = RepeatingLoader(make(2), **options)
        third.load_state_dict(stored(second.state_dict()))
        assert take(third, len(want) - stop - 2) == want[stop + 2 :], f"after {stop} and {stop + 2}"
        for batches in (first, second, third):
            batches.close()


def require_shuffled(batches: Batches, samples: Iterable[int]) -> None:
    """Each epoch has all of the samples once, in another order than the one before."""
    epochs: dict[int, list[int]] = {}
    for epoch, batch in batches:
        epochs.setdefault(epoch, []).extend(batch)
    orders = list(epochs.values())
    assert all(Counter(order) == Counter(samples) for order in orders)
    assert all(one != other for one, other in pairwise(orders))

"""Wrappers around loaders that no adapter knows: right, or told by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ds_loader import LoaderWarning, RepeatingLoader
from loops import by_hand, check_back_and_forth, check_epochs, check_resume, plain, repeated, seeded, take
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

SIZE = 7


def distributed() -> Any:
    return DistributedSampler(range(SIZE), num_replicas=2, rank=1, seed=3)


def inner() -> Any:
    return DataLoader(range(SIZE), batch_size=2, sampler=distributed())


def shuffled() -> Any:
    return DataLoader(range(SIZE), batch_size=2, sampler=RandomSampler(range(SIZE), generator=seeded()))


class Prefetching:
    """Copies batches one ahead, as timm's PrefetchLoader does."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        ahead = None
        for batch in self.loader:
            if ahead is not None:
                yield ahead
            ahead = batch * 2
        yield ahead

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        return self.loader.sampler


class Forever:
    """Gives the batches of a batch sampler without an end."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from iter(self.sampler)


class MultiEpochs(DataLoader):
    """Keeps one iterator, and so its workers, over all epochs, as timm's and ultralytics' loaders do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Forever(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            yield next(self.iterator)


class Doubling(DataLoader):
    """Has an ``__iter__`` of its own."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield 2 * batch


class Named:
    """Holds what it wraps under any name."""

    def __init__(self, name: str, value: Any) -> None:
        setattr(self, name, value)
        self.name = name

    def __iter__(self) -> Iterator[Any]:
        value = getattr(self, self.name)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for part in parts:
            yield from part


class OddlyNamed:
    """Draws indices by a sampler that no library would look for there."""

    def __init__(self, sampler: Any) -> None:
        self.who_comes_next = BatchSampler(sampler, 2, False)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.who_comes_next:
            yield torch.tensor(batch)


class Slotted:
    """Has no ``__dict__``."""

    __slots__ = ("loader",)

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Shards(IterableDataset):
    """The source of a pipeline; shuffles by its epoch."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter((torch.randperm(SIZE, generator=seeded(self.epoch)) + 10).tolist())


class Stage:
    """Shuffles what comes by a small buffer; it seeds its generator by the epoch, as webdataset's ``detshuffle``."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def run(self, source: Any) -> Iterator[Any]:
        generator, buffer = seeded(self.epoch), []
        for item in source:
            buffer.append(item)
            if len(buffer) == 3:
                yield buffer.pop(int(torch.randint(3, (), generator=generator)))
        yield from buffer


class Pipeline(IterableDataset):
    """Stages in a list, as webdataset's ``DataPipeline``."""

    def __init__(self, *stages: Any) -> None:
        self.pipeline = list(stages)

    def __iter__(self) -> Iterator[Any]:
        source: Any = self.pipeline[0]
        for stage in self.pipeline[1:]:
            source = stage.run(source)
        return iter(source)


LOADERS: dict[str, Callable[[], Any]] = {
    "prefetching": lambda: Prefetching(inner()),
    "prefetching, a generator": lambda: Prefetching(shuffled()),
    "own __iter__": lambda: Doubling(range(SIZE), batch_size=2, sampler=distributed()),
    "own __iter__, a generator": lambda: Doubling(range(SIZE), sampler=RandomSampler(range(SIZE), generator=seeded())),
    "three deep": lambda: Named("inside", Prefetching(Named("below", inner()))),
    "list of loaders": lambda: Named("loaders", [inner(), shuffled()]),
    "tuple of wrappers": lambda: Named("loaders", (Prefetching(inner()), Named("it", inner()))),
    "dict of loaders": lambda: Named("by_task", {"a": inner(), "b": shuffled()}),
    "odd name": lambda: OddlyNamed(distributed()),
    "slots": lambda: Slotted(inner()),
    "pipeline": lambda: Pipeline(Shards(), Stage(), Stage()),
    "pipeline in a DataLoader": lambda: DataLoader(Pipeline(Shards(), Stage()), batch_size=2),
}


def tell_all(loader: Any, epoch: int) -> None:
    """Set the epoch wherever this file hides a ``set_epoch``."""
    pending = [loader]
    while pending:
        part = pending.pop()
        if isinstance(part, (list, tuple)):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
        elif hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        elif isinstance(part, Slotted):
            pending.append(part.loader)
        elif not isinstance(part, range):
            pending += getattr(part, "__dict__", {}).values()


@pytest.mark.parametrize("name", LOADERS)
def test_a_wrapper_is_exact(name: str) -> None:
    epochs = by_hand(LOADERS[name], tell=tell_all)
    assert epochs[0] != epochs[1]
    check_epochs(LOADERS[name], epochs)
    check_resume(LOADERS[name], epochs)
    check_back_and_forth(LOADERS[name], epochs)


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_is_told_of_a_wrapper_that_is_exact(name: str) -> None:
    RepeatingLoader(LOADERS[name]())


def test_samplers_without_generators_follow_from_the_seed() -> None:
    def make() -> Any:
        return Named(
            "loaders", [DataLoader(range(SIZE), shuffle=True), Prefetching(DataLoader(range(4), shuffle=True))]
        )

    torch.manual_seed(1)
    first = [plain(batch) for batch in repeated(make(), seed=3, max_epochs=3)]
    epochs = [first[11 * epoch :][:11] for epoch in range(3)]
    assert epochs[0] != epochs[1]
    assert all(sorted(batch[0] for batch in epoch[:7]) == list(range(SIZE)) for epoch in epochs)
    check_resume(make, epochs, seed=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_live_iterator_is_told(workers: int) -> None:
    source = MultiEpochs(range(SIZE), batch_size=2, shuffle=True, num_workers=workers)
    with pytest.warns(LoaderWarning, match="MultiEpochs: cannot resume exactly, because it holds an iterator"):
        loader = RepeatingLoader(source)
    assert sorted(x for batch in take(loader, 4) for x in batch) == list(range(SIZE))
    loader.close()


def test_a_live_iterator_in_a_wrapper_is_told() -> None:
    wrapped = Prefetching(MultiEpochs(range(SIZE), batch_size=2, shuffle=True))
    with pytest.warns(LoaderWarning, match="Prefetching: cannot resume exactly, because it holds an iterator"):
        RepeatingLoader(wrapped)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # workers are forked beside threads
def test_persistent_workers_in_a_wrapper_hear_the_epoch() -> None:
    epochs = by_hand(lambda: Prefetching(DataLoader(Shards(), batch_size=2)), tell=tell_all)
    loader = DataLoader(Shards(), batch_size=2, num_workers=1, persistent_workers=True)
    next(iter(loader))  # which starts them before anybody knows an epoch
    check_epochs(lambda: Prefetching(loader), epochs)
    check_resume(lambda: Prefetching(loader), epochs, [1, len(epochs[0])])


class ByChance:
    """Draws its order from no generator that anybody could find."""

    def __init__(self) -> None:
        self._count = 0

    def __iter__(self) -> Iterator[int]:
        self._count += 1
        return iter([self._count])


def test_an_order_that_nobody_can_set_is_told() -> None:
    with pytest.warns(LoaderWarning, match="ByChance: the order of ByChance cannot be changed from here"):
        RepeatingLoader(ByChance())


def test_a_dataloader_over_such_a_stream_is_told() -> None:
    with pytest.warns(LoaderWarning, match="the order of Unheard cannot be changed from here"):
        RepeatingLoader(DataLoader(Unheard()))


class Unheard(IterableDataset):
    """A stream without an epoch."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

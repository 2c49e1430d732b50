"""Loaders that keep a state of their own."""

import itertools

import pytest
import torch
from ds_loader import LoaderStateError, RepeatingLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

StatefulDataLoader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
StatefulRandomSampler = pytest.importorskip("torchdata.stateful_dataloader.sampler").RandomSampler

# torchdata 0.11 calls what torch 2.13 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

SIZE = 7


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Stream(IterableDataset):
    """Knows where it is."""

    def __init__(self):
        self.at = 0
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        while self.at < SIZE:
            self.at += 1
            yield 100 * self.epoch + self.at
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def distributed():
    return DistributedSampler(range(SIZE), num_replicas=2, rank=0, seed=3)


SOURCES = {
    "shuffled": lambda: StatefulDataLoader(
        range(SIZE), batch_size=2, sampler=StatefulRandomSampler(range(SIZE), generator=seeded())
    ),
    "torch sampler": lambda: StatefulDataLoader(
        range(SIZE), batch_size=2, sampler=RandomSampler(range(SIZE), generator=seeded())
    ),
    "distributed": lambda: StatefulDataLoader(range(SIZE), batch_size=2, sampler=distributed()),
    "stream": lambda: StatefulDataLoader(Stream(), batch_size=2),
}


def by_hand(make, epochs=3):
    loader = make()
    stream = []
    for epoch in range(epochs):
        for part in (loader.sampler, loader.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        stream.extend(batch.tolist() for batch in loader)
    return stream


def take(loader, count):
    return [batch.tolist() for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_resuming_after_any_batch(make):
    expected = by_hand(make)
    for stop in range(len(expected) - 1):
        first = RepeatingLoader(make())
        assert take(first, stop) == expected[:stop]
        state = first.state_dict()
        assert take(first, 1) == expected[stop : stop + 1]
        second = RepeatingLoader(make())
        second.load_state_dict(state)
        assert take(second, len(expected) - stop) == expected[stop:], f"stopped after {stop} batches"


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_resuming_again_and_again(make):
    expected = by_hand(make)
    state, seen = None, []
    for count in itertools.cycle([1, 0, 3, 2]):
        loader = RepeatingLoader(make())
        if state is not None:
            loader.load_state_dict(state)
        seen += take(loader, count)
        state = loader.state_dict()
        if len(seen) >= len(expected):
            break
    assert seen[: len(expected)] == expected


def test_a_generator_shared_by_loader_and_sampler():
    def shared():
        return StatefulDataLoader(range(SIZE), batch_size=2, shuffle=True, generator=seeded())

    expected = by_hand(SOURCES["shuffled"])  # there the worker seeds come from elsewhere
    for stop in range(len(expected) - 1):
        first = RepeatingLoader(shared())
        assert take(first, stop) == expected[:stop]
        second = RepeatingLoader(shared())
        second.load_state_dict(first.state_dict())
        assert take(second, len(expected) - stop) == expected[stop:], f"stopped after {stop} batches"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("stop", [0, 2, 4, 5])
def test_with_workers(stop):
    def make():
        return StatefulDataLoader(range(SIZE), batch_size=2, sampler=distributed(), num_workers=2)

    expected = by_hand(SOURCES["distributed"])
    first = RepeatingLoader(make())
    assert take(first, stop) == expected[:stop]
    second = RepeatingLoader(make())
    second.load_state_dict(first.state_dict())
    assert take(second, len(expected) - stop) == expected[stop:]


def test_a_state_of_a_plain_loader_is_refused():
    plain = RepeatingLoader([1, 2])
    with pytest.raises(LoaderStateError, match="the state does not fit: world_size: 1 in the state, 2 here"):
        RepeatingLoader(SOURCES["distributed"]()).load_state_dict(plain.state_dict())


def test_a_state_of_a_loader_that_keeps_one_is_refused_by_a_plain_one():
    stateful = RepeatingLoader(SOURCES["stream"]())
    take(stateful, 2)
    plain = RepeatingLoader(DataLoader(Stream(), batch_size=2))
    with pytest.raises(LoaderStateError, match=r"another kind of loader: .* but DataLoader keeps none"):
        plain.load_state_dict(stateful.state_dict())

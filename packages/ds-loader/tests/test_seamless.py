"""The workers of the next epoch start while this one is not over."""

import gc
import itertools
import json
import multiprocessing
import os
import weakref

import pytest
import torch
from ds_loader import RepeatingLoader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

SIZE = 8
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


class Hears(Dataset):
    """Its samples depend on the epoch that it was told."""

    def __init__(self):
        self.epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return 100 * self.epoch + index


class Stream(IterableDataset):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(SIZE))


class FailsOnce(Dataset):
    def __init__(self, marker):
        self.marker = marker

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index == SIZE - 1 and not self.marker.exists():
            self.marker.touch()
            raise OSError("not there yet")
        return index


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def with_workers(data=range(SIZE), **options):
    return DataLoader(data, num_workers=2, prefetch_factor=1, **options)


SOURCES = {
    "sequential": lambda workers: DataLoader(range(SIZE), num_workers=workers),
    "given generator": lambda workers: DataLoader(range(SIZE), batch_size=3, shuffle=True, num_workers=workers),
    "own generator": lambda workers: DataLoader(
        range(SIZE), batch_size=3, sampler=RandomSampler(range(SIZE), generator=seeded()), num_workers=workers
    ),
    "shared generator": lambda workers: DataLoader(
        range(SIZE), batch_size=3, shuffle=True, generator=seeded(), num_workers=workers
    ),
    "distributed": lambda workers: DataLoader(
        range(SIZE), batch_size=2, sampler=DistributedSampler(range(SIZE), 2, 1, seed=3), num_workers=workers
    ),
    "hears": lambda workers: DataLoader(Hears(), batch_size=3, shuffle=True, generator=seeded(), num_workers=workers),
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def workers():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture(autouse=True)
def no_workers_before_and_after():
    gc.collect()  # of other tests
    assert workers() == set()
    yield
    assert workers() == set()


# When they start


def test_the_next_workers_start_before_the_last_batch_is_handed_out():
    loader = RepeatingLoader(with_workers())
    take(loader, 1)
    first = workers()
    assert len(first) == 2
    counts = []
    while loader.batch < SIZE - 1:
        take(loader, 1)
        counts.append(len(workers()))
    assert counts[0] == 2  # not from the beginning
    assert counts[-1] == 4
    second = workers() - first
    take(loader, 2)  # the last one, and the first of the next
    assert loader.epoch == 1
    assert workers() == second
    loader.close()


def test_they_start_at_the_end_where_it_is_off():
    loader = RepeatingLoader(with_workers(), seamless=False)
    for _ in range(20):
        take(loader, 1)
        assert len(workers()) <= 2
    loader.close()


@pytest.mark.parametrize(
    "source",
    [
        lambda: with_workers(Hears()),
        lambda: with_workers(Hears(), persistent_workers=True),
        lambda: with_workers(persistent_workers=True),
        lambda: with_workers(Stream()),
    ],
    ids=["hears", "hears, persistent", "persistent", "stream"],
)
def test_it_is_off_where_workers_must_not_start_early(source):
    loader = RepeatingLoader(source())
    for _ in range(20):
        take(loader, 1)
        assert len(workers()) <= 2
    loader.close()


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 2 * SIZE}, {"max_steps": 2 * SIZE - 1}])
def test_no_workers_start_for_an_epoch_behind_the_limit(limit):
    loader = RepeatingLoader(with_workers(), **limit)
    take(loader, SIZE + 1)
    for _ in loader:
        assert len(workers()) <= 2
    loader.close()


def test_one_epoch_is_started_ahead_and_no_more():
    loader = RepeatingLoader(DataLoader(range(2), num_workers=2, prefetch_factor=4))
    for _ in range(9):
        take(loader, 1)
        assert len(workers()) <= 4
    loader.close()


# What it gives


@every_source
def test_the_order_is_that_without_it(make):
    expected = take(RepeatingLoader(make(0)), 14)
    for seamless in (True, False):
        loader = RepeatingLoader(make(2), seamless=seamless)
        assert take(loader, 14) == expected
        loader.close()


@every_source
def test_resuming_at_every_stop(make):
    expected = take(RepeatingLoader(make(0)), 16)
    first = RepeatingLoader(make(2))
    for stop in range(9):
        state = json.loads(json.dumps(first.state_dict()))
        second = RepeatingLoader(make(2 if stop % 2 else 0))
        second.load_state_dict(state)
        assert take(second, 5) == expected[stop : stop + 5], f"stopped after {stop}"
        second.close()
        assert take(first, 1) == expected[stop : stop + 1]  # taking the state changed nothing
    first.close()


@every_source
def test_skip_and_going_back_while_the_next_epoch_is_started(make):
    expected = take(RepeatingLoader(make(0)), 20)
    length = len(make(0))
    loader = RepeatingLoader(make(2))
    take(loader, length - 1)
    state = loader.state_dict()
    loader.skip(length)
    assert take(loader, 3) == expected[2 * length - 1 : 2 * length + 2]
    loader.load_state_dict(state)
    assert take(loader, 3) == expected[length - 1 : length + 2]
    loader.close()


@pytest.mark.parametrize("make", [SOURCES[name] for name in ("own generator", "distributed")])
def test_verify_while_the_next_epoch_is_started(make):
    expected = take(RepeatingLoader(make(0)), 12)
    loader, seen = RepeatingLoader(make(2)), []
    for _ in expected:
        found = loader.verify()
        assert (found.lost, found.twice, found.seen + found.left) == (0, 0, SIZE)
        seen += take(loader, 1)
    assert seen == expected
    loader.close()


def test_an_error_while_the_next_epoch_is_started(tmp_path):
    loader = RepeatingLoader(DataLoader(FailsOnce(tmp_path / "failed"), batch_size=2, num_workers=2))
    assert take(loader, 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(OSError, match="not there yet"):
        next(loader)
    assert take(loader, 3) == [[6, 7], [0, 1], [2, 3]]
    loader.close()


def test_persistent_workers_whose_dataset_hears_the_epoch_are_started_anew():
    loader = RepeatingLoader(with_workers(Hears(), batch_size=4, persistent_workers=True))
    pids = []
    for epoch in range(3):
        assert take(loader, 1) == [[100 * epoch + n for n in range(4)]]
        pids.append(workers())
        assert take(loader, 1) == [[100 * epoch + n for n in range(4, SIZE)]]
    assert pids[0].isdisjoint(pids[1])
    assert pids[1].isdisjoint(pids[2])
    loader.close()


def test_persistent_workers_whose_dataset_does_not_stay():
    loader = RepeatingLoader(with_workers(batch_size=4, persistent_workers=True))
    pids = []
    for _ in range(3):
        assert take(loader, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        pids.append(workers())
    assert pids[0] == pids[1] == pids[2] != set()
    loader.close()


# How they end


@pytest.mark.parametrize("stop", [1, SIZE - 1, SIZE, SIZE + 1])
@pytest.mark.parametrize("seamless", [True, False])
def test_nothing_keeps_a_loader_that_is_dropped(stop, seamless):
    loader = RepeatingLoader(with_workers(), seamless=seamless)
    take(loader, stop)
    loader.state_dict()
    pids, gone = workers(), weakref.ref(loader)
    assert pids
    gc.disable()
    try:
        del loader
        assert gone() is None
        assert workers() == set()
    finally:
        gc.enable()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("options", [{}, {"max_steps": 9}, {"to_device": "cpu"}, {"on_error": "skip"}])
def test_nothing_keeps_a_loader_without_workers(options):
    loader = RepeatingLoader(DataLoader(range(SIZE), shuffle=True), **options)
    take(loader, 3)
    gone = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert gone() is None
    finally:
        gc.enable()


def test_an_error_does_not_keep_workers():
    class Broken(Hears):
        def __getitem__(self, index):
            raise OSError("cannot be loaded")

    gc.disable()
    try:
        loader = RepeatingLoader(with_workers(Broken()))
        for _ in range(3):
            with pytest.raises(OSError, match="cannot be loaded"):
                next(loader)
        assert len(workers()) <= 2
        loader.close()
        assert workers() == set()
    finally:
        gc.enable()


def test_an_error_that_was_skipped_does_not_keep_workers():
    class Broken(Dataset):
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            if index == 2:
                raise OSError("cannot be loaded")
            return index

    gc.disable()
    try:
        loader = RepeatingLoader(with_workers(Broken()), on_error="skip")
        assert take(loader, 3) == [[0], [1], [3]]
        del loader
        assert workers() == set()
    finally:
        gc.enable()


@pytest.mark.parametrize("stop", [1, SIZE - 1, SIZE])
def test_close_ends_those_of_both_epochs(stop):
    loader = RepeatingLoader(with_workers())
    expected = take(RepeatingLoader(DataLoader(range(SIZE))), 3 * SIZE)
    take(loader, stop)
    loader.close()
    assert workers() == set()
    assert take(loader, SIZE) == expected[stop : stop + SIZE]
    loader.close()

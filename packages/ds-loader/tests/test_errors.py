"""Batches that cannot be loaded."""

import itertools
import json
import logging
import os
import warnings

import pytest
import torch
from ds_loader import LoaderStateError, LoaderWarning, RepeatingLoader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

SIZE = 8
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
workers = pytest.mark.parametrize("workers", [0, 2])


class Broken(Dataset):
    """Some samples cannot be loaded; ``times`` says how often each, where that is not always."""

    def __init__(self, *broken, times=None):
        self.broken = broken
        self.times = times

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index in self.broken and self.times != 0:
            if self.times is not None:
                self.times -= 1
            raise OSError(f"sample {index}")
        return index


class Iterable:
    """By a generator function, which ends at an error."""

    def __init__(self, dataset):
        self.dataset = dataset

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        for index in range(SIZE):
            yield self.dataset[index]


class Iterating:
    """By an iterator that goes on after an error."""

    class Iterator:
        def __init__(self, dataset):
            self.dataset = dataset
            self.at = -1

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            if self.at == SIZE:
                raise StopIteration
            return self.dataset[self.at]

    def __init__(self, dataset):
        self.dataset = dataset

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        return self.Iterator(self.dataset)


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        return iter(Iterating(self.dataset))


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def take_over_errors(loader, count, kind=OSError):
    """So many batches, and where errors came between."""
    seen, errors = [], []
    while len(seen) < count:
        assert len(errors) < 50, "errors for ever"
        try:
            seen.append(as_list(next(loader)))
        except kind:
            errors.append(len(seen))
    return seen, errors


def batches_without(*left_out, size=2):
    return [batch for n in range(0, SIZE, size) if (batch := list(range(n, n + size))) and n // size not in left_out]


def resumed(source, state, **options):
    loader = RepeatingLoader(source, **options)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


# "raise"


@workers
def test_an_error_is_passed_on_and_the_batch_tried_again(workers):
    loader = RepeatingLoader(DataLoader(Broken(4, times=1), batch_size=2, num_workers=workers))
    # A worker has a copy of the dataset: there it fails once in every one.
    seen, errors = take_over_errors(loader, 2)
    assert (seen, errors) == (batches_without()[:2], [])
    with pytest.raises(OSError, match="sample 4"):
        next(loader)
    assert (loader.epoch, loader.batch, loader.step) == (0, 2, 2)
    if workers == 0:
        assert take(loader, 6) == [*batches_without()[2:], *batches_without()]
        assert loader.state_dict()["left_out"] == 0
    loader.close()


@workers
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_batch_that_fails_twice_in_a_row_is_left_out(workers, at):
    bad = at // 2
    loader = RepeatingLoader(DataLoader(Broken(at), batch_size=2, num_workers=workers))
    seen, errors = take_over_errors(loader, 6)
    assert seen == (batches_without(bad) * 2)[:6]
    assert errors == [bad, bad, 3 + bad, 3 + bad][: len(errors)]
    assert len(errors) == (4 if bad < 3 else 2)
    loader.close()


def test_neighbours_that_fail_are_left_out_each():
    loader = RepeatingLoader(DataLoader(Broken(2, 5), batch_size=2))
    seen, errors = take_over_errors(loader, 4)
    assert (seen, errors) == ([[0, 1], [6, 7], [0, 1], [6, 7]], [1, 1, 1, 1, 3, 3, 3, 3])


def test_a_batch_that_fails_now_and_then_is_never_left_out():
    class NowAndThen(Broken):
        calls = 0

        def __getitem__(self, index):
            self.calls += index == 2
            if index == 2 and self.calls % 2:
                raise OSError("now")
            return index

    loader = RepeatingLoader(DataLoader(NowAndThen(), batch_size=2))
    seen, errors = take_over_errors(loader, 12)
    assert (seen, errors) == (batches_without() * 3, [1, 5, 9])


def test_the_error_is_that_of_the_dataset():
    error = KeyError("mine")

    class Raises(Broken):
        def __getitem__(self, index):
            raise error

    with pytest.raises(KeyError) as caught:
        next(RepeatingLoader(DataLoader(Raises())))
    assert caught.value is error


def test_an_interrupt_is_passed_on_and_changes_nothing():
    class Interrupted(Broken):
        def __getitem__(self, index):
            if index == 3 and self.times:
                self.times -= 1
                raise KeyboardInterrupt
            return index

    loader = RepeatingLoader(DataLoader(Interrupted(times=1), batch_size=1), on_error="skip")
    take(loader, 3)
    state = loader.state_dict()
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    assert loader.state_dict() == state
    assert take(resumed(DataLoader(Broken()), state), 3) == [[3], [4], [5]]


# "skip"


@workers
@pytest.mark.parametrize("at", [0, 3, 7])
def test_skip_leaves_the_batch_out_with_a_warning(workers, at, caplog):
    bad = at // 2
    loader = RepeatingLoader(DataLoader(Broken(at), batch_size=2, num_workers=workers), on_error="skip")
    with caplog.at_level(logging.WARNING, "ds.loader"):
        assert take(loader, 9) == batches_without(bad) * 3
    first = f"batch {bad} of epoch 0 is left out: OSError: "
    assert caplog.messages[0].startswith(first)
    assert f"sample {at}" in caplog.messages[0]
    assert len(caplog.messages) == 3 if bad < 3 else 2
    loader.close()


@pytest.mark.parametrize("source", [Iterating, lambda dataset: DataLoader(Stream(dataset), batch_size=None)])
def test_skip_of_what_goes_on_after_an_error(source):
    loader = RepeatingLoader(source(Broken(0, 3, 7)), on_error="skip")
    assert take(loader, 11) == [1, 2, 4, 5, 6, 1, 2, 4, 5, 6, 1]


class Generating(Stream):
    def __iter__(self):
        yield from Iterable(self.dataset)


class GivingAGenerator(Stream):
    def __iter__(self):
        return iter(Iterable(self.dataset))


@pytest.mark.parametrize("on_error", ["raise", "skip", lambda *_: "skip"])
@pytest.mark.parametrize(
    "source",
    [
        Iterable,
        lambda dataset: DataLoader(Generating(dataset), batch_size=None),
        lambda dataset: DataLoader(Generating(dataset), batch_size=None, num_workers=1),
        lambda dataset: DataLoader(GivingAGenerator(dataset), batch_size=None),
    ],
    ids=["iterable", "stream", "stream with workers", "stream that gives a generator"],
)
def test_a_generator_that_ended_with_the_error_cannot_be_skipped(source, on_error):
    loader = RepeatingLoader(source(Broken(3)), on_error=on_error, max_errors=100)
    seen, errors = [], 0
    for _ in range(8):
        try:
            seen.append(next(loader))
        except OSError:
            errors += 1
    assert (seen, errors) == ([0, 1, 2], 5)  # the rest of the epoch is not lost in silence
    assert (loader.epoch, loader.batch, loader.step) == (0, 3, 3)
    loader.close()


def test_a_generator_that_fails_once_is_tried_again():
    loader = RepeatingLoader(Iterable(Broken(3, times=1)))
    seen, errors = take_over_errors(loader, 9)
    assert (seen, errors) == ([*range(SIZE), 0], [3])


@workers
def test_max_errors_bounds_what_is_skipped_in_an_epoch(workers):
    loader = RepeatingLoader(
        DataLoader(Broken(2, 3, 4, 6), num_workers=workers, batch_size=1), on_error="skip", max_errors=3
    )
    seen, errors = [], 0
    for _ in range(6):
        try:
            seen += as_list(next(loader))
        except OSError:
            errors += 1
    assert (seen, errors) == ([0, 1, 5], 3)
    assert (loader.batch, loader.step) == (6, 3)
    loader.close()


def test_max_errors_counts_anew_every_epoch():
    loader = RepeatingLoader(DataLoader(Broken(2, 3)), on_error="skip", max_errors=2)
    assert len(take(loader, 30)) == 30


def test_no_errors_are_skipped_with_max_errors_0():
    loader = RepeatingLoader(DataLoader(Broken(0)), on_error="skip", max_errors=0)
    with pytest.raises(OSError, match="sample 0"):
        next(loader)


def test_a_dataset_of_which_nothing_can_be_loaded_does_not_loop_for_ever():
    loader = RepeatingLoader(DataLoader(Broken(*range(SIZE))), on_error="skip", max_errors=5)
    for _ in range(2):
        with pytest.raises(OSError, match="sample 5"):
            next(loader)


def test_an_epoch_in_which_everything_was_left_out_is_not_empty():
    loader = RepeatingLoader(
        DataLoader(Broken(*range(SIZE)), batch_size=4), on_error="skip", max_errors=2, max_epochs=3
    )
    assert list(loader) == []
    assert (loader.epoch, loader.step) == (3, 0)


# A function


@workers
def test_a_function_is_told_and_may_skip(workers):
    told = []

    def on_error(error, epoch, batch):
        told.append((type(error), epoch, batch))
        return "skip"

    loader = RepeatingLoader(DataLoader(Broken(4), batch_size=2, num_workers=workers), on_error=on_error)
    assert take(loader, 6) == batches_without(2) * 2
    assert told == [(OSError, 0, 2), (OSError, 1, 2)]
    loader.close()


@pytest.mark.parametrize("source", [lambda dataset: DataLoader(dataset, batch_size=None), Iterable, Iterating])
def test_a_function_may_try_again(source):
    told = []

    def on_error(error, epoch, batch):
        told.append((epoch, batch))
        return "retry"

    loader = RepeatingLoader(source(Broken(4, times=3)), on_error=on_error)
    assert take(loader, 9) == [*range(SIZE), 0]
    assert told == [(0, 4)] * 3
    assert loader.state_dict()["left_out"] == 0


def test_trying_again_is_bounded():
    loader = RepeatingLoader(DataLoader(Broken(4)), on_error=lambda *_: "retry", max_errors=7)
    seen, calls = take(loader, 4), 0
    with pytest.raises(OSError, match="sample 4"):
        next(loader)
    assert (seen, calls) == ([[0], [1], [2], [3]], 0)
    assert (loader.epoch, loader.batch) == (0, 4)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, ValueError, "'skip' or 'retry', not None"),
        ("ignore", ValueError, "not 'ignore'"),
        (1, ValueError, "not 1"),
    ],
)
def test_a_wrong_answer(answer, error, message):
    answers = iter([answer, "skip"])
    loader = RepeatingLoader(DataLoader(Broken(4), batch_size=2), on_error=lambda *_: next(answers))
    take(loader, 2)
    with pytest.raises(error, match=message) as caught:
        next(loader)
    assert isinstance(caught.value.__cause__, OSError)
    assert (loader.epoch, loader.batch) == (0, 2)
    assert take(loader, 1) == [[6, 7]]
    assert loader.batch == 4


@pytest.mark.parametrize(("raised", "seen"), [(KeyError("stop here"), KeyError), (StopIteration(), RuntimeError)])
def test_a_function_may_raise(raised, seen):
    def on_error(error, epoch, batch):
        raise raised

    loader = RepeatingLoader(DataLoader(Broken(4, times=2), batch_size=2), on_error=on_error)
    take(loader, 2)
    for _ in range(2):
        with pytest.raises(seen):
            next(loader)
        assert (loader.epoch, loader.batch, loader.step) == (0, 2, 2)
    assert take(loader, 3) == [[4, 5], [6, 7], [0, 1]]


# What the ledger says


@workers
@pytest.mark.parametrize("options", [{"on_error": "skip"}, {}])
def test_the_ledger_counts_what_was_left_out(workers, options):
    loader = RepeatingLoader(DataLoader(Broken(2), batch_size=2, num_workers=workers), **options)
    seen, _ = take_over_errors(loader, 2)
    assert seen == [[0, 1], [4, 5]]
    assert (loader.batch, loader.step) == (3, 2)
    state = loader.state_dict()
    assert [state[name] for name in ("batch", "step", "left_out", "samples")] == [3, 2, 1, 6]
    take_over_errors(loader, 2)
    assert loader.state_dict()["left_out"] == 0  # of this epoch
    assert (loader.epoch, loader.batch, loader.step) == (1, 1, 4)
    loader.close()


SOURCES = {
    "map-style": lambda: DataLoader(Broken(2), batch_size=1),
    "workers": lambda: DataLoader(Broken(2), batch_size=1, num_workers=2),
    "stream": lambda: DataLoader(Stream(Broken(2)), batch_size=1),
    "iterable": lambda: Iterating(Broken(2)),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_resuming_before_and_behind_a_batch_that_was_left_out(make):
    expected = take(RepeatingLoader(make(), on_error="skip"), 16)
    for stop in range(10):
        first = RepeatingLoader(make(), on_error="skip")
        assert take(first, stop) == expected[:stop]
        second = resumed(make(), first.state_dict(), on_error="skip")
        assert (second.epoch, second.batch, second.step) == (first.epoch, first.batch, first.step)
        assert take(second, 5) == expected[stop : stop + 5], f"stopped after {stop}"
        first.close()
        second.close()


def test_a_state_between_two_failures_tries_again():
    loader = RepeatingLoader(DataLoader(Broken(4, times=1), batch_size=2))
    take(loader, 2)
    with pytest.raises(OSError, match="sample 4"):
        next(loader)
    assert take(resumed(DataLoader(Broken(), batch_size=2), loader.state_dict()), 2) == [[4, 5], [6, 7]]


@workers
@pytest.mark.parametrize("limit", [{"max_steps": 9}, {"max_epochs": 3}])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_limits_go_on_behind_an_error(workers, limit, on_error):
    loader = RepeatingLoader(DataLoader(Broken(2), batch_size=2, num_workers=workers), on_error=on_error, **limit)
    seen, _ = take_over_errors(loader, 9)
    assert seen == batches_without(1) * 3
    assert list(loader) == []
    loader.close()


def test_skip_passes_over_a_broken_batch_without_loading_it():
    loader = RepeatingLoader(DataLoader(Broken(2), batch_size=2))
    loader.skip(2)
    assert take(loader, 2) == [[4, 5], [6, 7]]


def test_other_ranks_go_on_behind_what_was_left_out():
    def ranks(world_size, batch_size, state=None):
        for rank in range(world_size):
            sampler = DistributedSampler(range(SIZE), world_size, rank, shuffle=False)
            loader = RepeatingLoader(DataLoader(Broken(2), batch_size=batch_size, sampler=sampler), on_error="skip")
            if state is not None:
                loader.load_state_dict(state)
            yield loader

    first = list(ranks(2, 1))
    for loader in first:
        loader.skip(1)
    assert [take(loader, 1) for loader in first] == [[[4]], [[3]]]  # the first one leaves 2 out
    rest = [take(loader, 1) for loader in ranks(1, 2, first[1].state_dict())]
    assert rest == [[[4, 5]]]


# Workers that die


class Deadly(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index == 4:
            os._exit(7)
        return index


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.timeout(60)
def test_a_worker_that_dies_does_not_loop_for_ever(persistent):
    source = DataLoader(Deadly(), batch_size=2, num_workers=1, prefetch_factor=1, persistent_workers=persistent)
    loader = RepeatingLoader(source)
    seen, errors = [], 0
    while [6, 7] not in seen:
        assert errors < 10
        try:
            seen.append(as_list(next(loader)))
        except RuntimeError:
            errors += 1
    assert errors >= 2
    assert loader.epoch == 0
    assert loader.step + loader.state_dict()["left_out"] == loader.batch == 4
    loader.close()


@pytest.mark.timeout(60)
def test_a_worker_that_dies_is_skipped_with_its_batch_alone():
    source = DataLoader(Deadly(), batch_size=2, num_workers=1, prefetch_factor=1)
    loader = RepeatingLoader(source, on_error="skip", max_errors=4)
    seen = take(loader, 2)
    while loader.epoch == 0 and loader.batch < 4:
        seen += take(loader, 1)
    assert [4, 5] not in seen
    assert seen[-1] == [6, 7]
    loader.close()


# What is no error of a batch


def test_a_wrong_state_is_never_skipped():
    first = RepeatingLoader(DataLoader(range(8), batch_size=2, shuffle=True), seed=1)
    take(first, 2)
    state = {**first.state_dict(), "first": [0, 1]}
    loader = resumed(DataLoader(range(8), batch_size=2, shuffle=True), state, on_error="skip")
    for _ in range(3):
        with pytest.raises(LoaderStateError, match="other samples"):
            next(loader)


def test_an_error_of_iter_is_passed_on_and_the_epoch_begun_again():
    class Opens:
        fails = 2

        def __iter__(self):
            if self.fails:
                self.fails -= 1
                raise OSError("not there yet")
            return iter([1, 2])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoaderWarning)
        loader = RepeatingLoader(Opens())
    for _ in range(2):
        with pytest.raises(OSError, match="not there yet"):
            next(loader)
    assert take(loader, 3) == [1, 2, 1]

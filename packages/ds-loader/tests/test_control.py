"""How far it goes, what is skipped, and how it ends."""

import itertools
import multiprocessing
import random

import pytest
import torch
from ds_loader import EmptyLoaderError, LoaderStateError, OneShotLoaderError, RepeatingLoader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

SIZE = 7


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Stream(IterableDataset):
    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([100 * self.epoch + n for n in range(SIZE)])


class NoLength:
    """Any iterable, another one every epoch."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([100 * self.epoch + n for n in range(SIZE)])


def own_generator(**options):
    return DataLoader(range(SIZE), batch_size=2, sampler=RandomSampler(range(SIZE), generator=seeded()), **options)


def shared_generator():
    return DataLoader(range(SIZE), batch_size=2, shuffle=True, generator=seeded())


def distributed():
    return DataLoader(range(SIZE), batch_size=2, sampler=DistributedSampler(range(SIZE), 2, 1, seed=3))


class ByEpoch:
    """A batch sampler that shuffles by the epoch it is told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(SIZE, generator=seeded(self.epoch)).tolist()
        return iter([order[:3], order[3:]])

    def __len__(self):
        return 2


SOURCES = {
    "list": lambda: list(range(SIZE)),
    "own generator": own_generator,
    "shared generator": shared_generator,
    "drop_last": lambda: DataLoader(
        range(SIZE), batch_size=2, sampler=RandomSampler(range(SIZE), generator=seeded()), drop_last=True
    ),
    "distributed": distributed,
    "batch sampler": lambda: DataLoader(range(SIZE), batch_sampler=ByEpoch()),
    "unbatched": lambda: DataLoader(
        range(SIZE), batch_size=None, sampler=RandomSampler(range(SIZE), generator=seeded())
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "iterable": NoLength,
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


def by_hand(make, epochs):
    """The oracle: an ordinary loop for each epoch."""
    if make is shared_generator:  # a DataLoader draws seeds of workers from it, too; a RepeatingLoader does not
        make = own_generator
    loader = make()
    for epoch in range(epochs):
        for part in (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        yield [as_list(batch) for batch in loader]


def flat(epochs):
    return list(itertools.chain.from_iterable(epochs))


def resumed(make, state, **options):
    loader = RepeatingLoader(make(), **options)
    loader.load_state_dict(state)
    return loader


# max_epochs and max_steps


@every_source
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_max_epochs(make, epochs):
    loader = RepeatingLoader(make(), max_epochs=epochs)
    assert [as_list(batch) for batch in loader] == flat(by_hand(make, epochs))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)
    assert (loader.epoch, loader.batch) == (epochs, 0)


@every_source
@pytest.mark.parametrize("steps", [0, 1, 9])
def test_max_steps(make, steps):
    loader = RepeatingLoader(make(), max_steps=steps)
    assert [as_list(batch) for batch in loader] == flat(by_hand(make, 6))[:steps]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)
    assert loader.step == steps
    assert list(loader) == []


def test_what_is_reached_first_ends_it():
    assert len(list(RepeatingLoader([1, 2, 3], max_epochs=2, max_steps=10))) == 6
    assert len(list(RepeatingLoader([1, 2, 3], max_epochs=2, max_steps=5))) == 5
    assert len(list(RepeatingLoader([1, 2, 3], max_epochs=2, max_steps=6))) == 6


@every_source
@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 5}])
def test_limits_count_what_came_before_the_state(make, limit):
    expected = [as_list(batch) for batch in RepeatingLoader(make(), **limit)]
    for stop in range(len(expected) + 1):
        first = RepeatingLoader(make(), **limit)
        assert take(first, stop) == expected[:stop]
        second = resumed(make, first.state_dict(), **limit)
        assert [as_list(batch) for batch in second] == expected[stop:]
        with pytest.raises(StopIteration):
            next(second)


def test_a_state_of_the_end_goes_on_with_a_higher_limit():
    loader = RepeatingLoader(own_generator(), max_steps=5)
    assert len(list(loader)) == 5
    assert take(resumed(own_generator, loader.state_dict(), max_steps=8), 9) == flat(by_hand(own_generator, 3))[5:8]
    loader = RepeatingLoader(own_generator(), max_epochs=1)
    assert len(list(loader)) == 4
    assert take(resumed(own_generator, loader.state_dict()), 4) == flat(by_hand(own_generator, 2))[4:]


def test_a_limit_below_the_state_gives_nothing():
    loader = RepeatingLoader([1, 2])
    take(loader, 5)
    for limit in ({"max_steps": 3}, {"max_epochs": 1}):
        assert list(resumed(lambda: [1, 2], loader.state_dict(), **limit)) == []


def test_an_endless_generator_with_max_steps():
    loader = RepeatingLoader((n for n in itertools.count()), max_steps=4)
    assert list(loader) == [0, 1, 2, 3]
    assert list(loader) == []
    assert loader.step == 4
    assert list(RepeatingLoader(itertools.count(), max_steps=2)) == [0, 1]
    assert list(RepeatingLoader(iter([5, 6, 7]), max_steps=3)) == [5, 6, 7]


@pytest.mark.parametrize("make", [lambda: (n for n in range(3)), lambda: iter([0, 1, 2])])
def test_a_generator_that_ends_before_max_steps(make):
    loader = RepeatingLoader(make(), max_steps=5)
    assert take(loader, 3) == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OneShotLoaderError, match=r"gave batches before, but none in epoch 1"):
            next(loader)


def test_a_generator_that_gives_nothing():
    with pytest.raises(EmptyLoaderError):
        next(RepeatingLoader((n for n in ()), max_steps=5))


def test_a_generator_is_taken_no_further_than_max_steps():
    source = itertools.count()
    assert list(RepeatingLoader(source, max_steps=3)) == [0, 1, 2]
    assert next(source) == 3


# Where it is


@every_source
def test_epoch_batch_and_step_at_every_batch(make):
    loader = RepeatingLoader(make())
    assert (loader.epoch, loader.batch, loader.step) == (0, 0, 0)
    step = 0
    for epoch, batches in enumerate(by_hand(make, 3)):
        for place, expected in enumerate(batches, 1):
            step += 1
            assert as_list(next(loader)) == expected
            assert (loader.epoch, loader.batch, loader.step) == (epoch, place, step)
            second = resumed(make, loader.state_dict())
            assert (second.epoch, second.batch, second.step) == (epoch, place, step)


# skip


@every_source
def test_skip_is_taking_by_hand(make):
    expected = flat(by_hand(make, 25))
    dice = random.Random(0)
    for _ in range(12):
        loader, at = RepeatingLoader(make()), 0
        while at < 20:
            count = dice.choice([0, 1, 2, 3, 5, 9, 14])
            loader.skip(count)
            at += count
            assert loader.step == at
            if dice.random() < 0.4:
                loader = resumed(make, loader.state_dict())
                assert loader.step == at
            taken = dice.choice([0, 1, 2, 4])
            assert take(loader, taken) == expected[at : at + taken]
            at += taken
            if dice.random() < 0.4:
                loader = resumed(make, loader.state_dict())


@every_source
def test_skip_leaves_the_place_that_taking_leaves(make):
    for before, count in itertools.product(range(0, 9, 2), range(12)):
        skipped, taken = RepeatingLoader(make()), RepeatingLoader(make())
        take(skipped, before)
        take(taken, before + count)
        skipped.skip(count)
        places = [(loader.epoch, loader.batch, loader.step) for loader in (skipped, taken)]
        assert places[0] == places[1]
        assert take(skipped, 3) == take(taken, 3)


def test_skip_loads_nothing_of_a_map_style_loader():
    loaded = []

    class Loud(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            loaded.append(index)
            return index

    loader = RepeatingLoader(DataLoader(Loud(), batch_size=10, shuffle=True, generator=seeded()))
    loader.skip(37)
    batch = take(loader, 1)
    assert loaded == batch[0]


def test_skip_ends_at_max_steps_and_max_epochs():
    for make in (own_generator, lambda: [1, 2, 3, 4]):
        for limit in ({"max_steps": 6}, {"max_epochs": 2}):
            loader = RepeatingLoader(make(), **limit)
            loader.skip(5)
            assert len(list(loader)) == (1 if "max_steps" in limit else 3)


@pytest.mark.parametrize("make", [own_generator, lambda: [1, 2, 3, 4]], ids=["by index", "by loading"])
@pytest.mark.parametrize("limit", [{"max_steps": 6}, {"max_epochs": 2}])
def test_skip_over_the_end_ends_it(make, limit):
    loader = RepeatingLoader(make(), **limit)
    loader.skip(50)
    assert list(loader) == []
    assert loader.step == (6 if "max_steps" in limit else 8)


def test_skip_with_a_seed():
    def make():
        return RepeatingLoader(own_generator(), seed=3)

    expected = take(make(), 30)
    for count in range(20):
        loader = make()
        loader.skip(count)
        assert take(loader, 5) == expected[count : count + 5]


# close


def workers():
    return sorted(process.pid for process in multiprocessing.active_children())


WITH_WORKERS = {
    "plain": lambda: own_generator(num_workers=2),
    "persistent": lambda: own_generator(num_workers=2, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), num_workers=1, batch_size=2),
    "persistent stream": lambda: DataLoader(Stream(), num_workers=1, batch_size=2, persistent_workers=True),
}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("make", WITH_WORKERS.values(), ids=WITH_WORKERS.keys())
def test_close_ends_the_workers_and_keeps_the_place(make):
    expected = flat(by_hand(SOURCES["stream"] if isinstance(make().dataset, Stream) else own_generator, 4))
    assert workers() == []
    loader, at = RepeatingLoader(make()), 0
    for count in (1, 2, 1, 3, 5):  # the middle, the last but one, the end of an epoch
        assert take(loader, count) == expected[at : at + count]
        at += count
        assert workers() != [] or at % 4 == 0
        state = loader.state_dict()
        loader.close()
        assert workers() == []
        assert loader.step == at
        assert {**loader.state_dict(), "first": None} == {**state, "first": None}
        loader.close()  # twice does no harm
    assert take(loader, 1) == expected[at : at + 1]
    loader.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_end_of_a_with_block_closes():
    with RepeatingLoader(own_generator(num_workers=2)) as loader:
        next(loader)
        assert len(workers()) >= 2
    assert workers() == []
    assert take(loader, 2) == flat(by_hand(own_generator, 1))[1:3]
    loader.close()


@every_source
def test_close_without_workers_keeps_the_place(make):
    expected = flat(by_hand(make, 4))
    loader = RepeatingLoader(make())
    loader.close()
    for batch in expected:
        assert take(loader, 1) == [batch]
        loader.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_the_end_by_a_limit_leaves_no_workers(persistent):
    loader = RepeatingLoader(own_generator(num_workers=2, persistent_workers=persistent), max_epochs=2)
    assert [as_list(batch) for batch in loader] == flat(by_hand(own_generator, 2))
    loader.close()
    assert workers() == []


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"set_epoch": "on"}, ValueError, "set_epoch must be one of 'auto', 'off' or a function, not 'on'"),
        ({"set_epoch": None}, ValueError, "set_epoch must be one of 'auto', 'off' or a function, not None"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of 'raise', 'skip' or a function, not 'ignore'"),
        ({"on_uneven": "pad"}, ValueError, "on_uneven must be one of 'cycle', 'stop', 'raise', not 'pad'"),
        ({"on_uneven": len}, ValueError, "on_uneven must be one of"),
        ({"seed": "3"}, TypeError, "seed must be an integer, not str"),
        ({"seed": True}, TypeError, "seed must be an integer, not bool"),
        ({"seed": -1}, ValueError, "seed must be at least 0, not -1"),
        ({"max_epochs": 1.0}, TypeError, "max_epochs must be an integer, not float"),
        ({"max_epochs": -1}, ValueError, "max_epochs must be at least 0, not -1"),
        ({"max_steps": "9"}, TypeError, "max_steps must be an integer, not str"),
        ({"max_steps": -2}, ValueError, "max_steps must be at least 0, not -2"),
        ({"max_errors": -3}, ValueError, "max_errors must be at least 0, not -3"),
        ({"max_errors": 0.5}, TypeError, "max_errors must be an integer, not float"),
        ({"max_errors": None}, TypeError, "max_errors must be an integer, not NoneType"),
        ({"to_device": "nowhere"}, RuntimeError, "nowhere"),
        ({"to_device": 1.5}, TypeError, "invalid combination of arguments"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        RepeatingLoader([1], **options)


@pytest.mark.parametrize(
    ("count", "error"), [(-1, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError), (None, TypeError)]
)
@every_source
def test_wrong_counts_of_skip(make, count, error):
    loader = RepeatingLoader(make())
    with pytest.raises(error, match="count must be"):
        loader.skip(count)
    assert take(loader, 1) == flat(by_hand(make, 1))[:1]


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        RepeatingLoader([1], "auto")


# StopIteration


class Stops:
    """Raises StopIteration where nobody expects it."""

    def __iter__(self):
        raise StopIteration("not the end")

    def set_epoch(self, epoch):
        pass


class StopsAt(Dataset):
    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == self.at:
            raise StopIteration("not the end")
        return index

    def set_epoch(self, epoch):
        pass


class StoppingSampler:
    def __iter__(self):
        raise StopIteration

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return 6


class StoppingSetEpoch:
    def set_epoch(self, epoch):
        raise StopIteration

    def __iter__(self):
        return iter([1])


@pytest.mark.parametrize(
    "make",
    [
        Stops,
        StoppingSetEpoch,
        lambda: DataLoader(range(6), sampler=StoppingSampler()),
        lambda: DataLoader(range(6), batch_sampler=StoppingSampler()),
        lambda: DataLoader(StopsAt(0), batch_size=2),
        lambda: DataLoader(StopsAt(0), batch_size=None),
        lambda: DataLoader(StopsAt(0), batch_size=2, num_workers=1),
    ],
    ids=["iter", "set_epoch", "sampler", "batch sampler", "dataset", "unbatched", "workers"],
)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_stop_iteration_of_somebody_else_never_escapes(make):
    loader = RepeatingLoader(make())
    for _ in range(2):
        with pytest.raises((RuntimeError, EmptyLoaderError)):
            next(loader)
    with pytest.raises((RuntimeError, EmptyLoaderError)):  # a loop must not end in silence
        for _ in loader:
            pass
    loader.close()


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_dataset_that_raises_stop_iteration_does_not_shorten_an_epoch(at, workers):
    loader = RepeatingLoader(DataLoader(StopsAt(at), num_workers=workers))
    seen, errors = [], 0
    while len(seen) < 10:
        try:
            seen += as_list(next(loader))
        except RuntimeError:
            errors += 1
    assert seen == ([n for n in range(6) if n != at] * 2)[:10]
    assert errors >= 2
    loader.close()


def test_an_error_of_the_state_is_no_stop_iteration():
    for error in (EmptyLoaderError, OneShotLoaderError, LoaderStateError):
        assert not issubclass(error, StopIteration)

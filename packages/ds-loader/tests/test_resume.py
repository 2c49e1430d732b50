"""Stop anywhere, go on elsewhere: the batches are those of the run that never stopped."""

import dataclasses
import io
import itertools
import json

import pytest
import torch
from ds_loader import LoaderStateError, RepeatingLoader
from ds_loader._ledger import Ledger
from ds_loader._random import mixed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SIZE = 7
EPOCHS = 4


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Stream(IterableDataset):
    """Another order every epoch, and as many as there are."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([100 * self.epoch + n for n in range(SIZE)])


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


def own_generator():
    return DataLoader(range(SIZE), batch_size=2, sampler=RandomSampler(range(SIZE), generator=seeded()))


SOURCES = {
    "list": lambda: list(range(SIZE)),
    "sequential": lambda: DataLoader(range(SIZE), batch_size=2),
    "sampler": own_generator,
    "replacement": lambda: DataLoader(
        range(SIZE), batch_size=9, sampler=RandomSampler(range(SIZE), True, 70, generator=seeded())
    ),
    "oversampled": lambda: DataLoader(
        range(SIZE), batch_size=4, sampler=RandomSampler(range(SIZE), False, 17, generator=seeded())
    ),
    "subset": lambda: DataLoader(range(SIZE), batch_size=2, sampler=SubsetRandomSampler(range(5), generator=seeded())),
    "weighted": lambda: DataLoader(
        range(SIZE), batch_size=2, sampler=WeightedRandomSampler([1.0] * SIZE, 6, generator=seeded())
    ),
    "batch sampler": lambda: DataLoader(
        range(SIZE), batch_sampler=BatchSampler(RandomSampler(range(SIZE), generator=seeded()), 3, False)
    ),
    "batch sampler by epoch": lambda: DataLoader(range(SIZE), batch_sampler=ByEpoch()),
    "unbatched": lambda: DataLoader(
        range(SIZE), batch_size=None, sampler=RandomSampler(range(SIZE), generator=seeded())
    ),
    "distributed": lambda: DataLoader(
        range(SIZE), batch_size=2, sampler=DistributedSampler(range(SIZE), num_replicas=2, rank=1, seed=3)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
}


def by_hand(make, epochs=EPOCHS):
    """The oracle: ordinary loops over the source, one an epoch, told the epoch as PyTorch's examples do."""
    loader = make()
    stream = []
    for epoch in range(epochs):
        for part in (getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        stream.extend(as_list(batch) for batch in loader)
    return stream


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def as_lists(batches):
    return [as_list(batch) for batch in batches]


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def through_a_file(state):
    """Both ways in which a checkpoint may hold it."""
    file = io.BytesIO()
    torch.save(json.loads(json.dumps(state)), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_uninterrupted_is_what_loops_by_hand_give(make):
    expected = by_hand(make)
    assert take(RepeatingLoader(make()), len(expected)) == expected


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_resuming_after_any_batch(make):
    expected = by_hand(make)
    for stop in range(len(expected) - 1):
        first = RepeatingLoader(make())
        assert take(first, stop) == expected[:stop]
        second = RepeatingLoader(make())
        second.load_state_dict(through_a_file(first.state_dict()))
        assert (second.epoch, second.batch) == (first.epoch, first.batch)
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


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_the_same_object_can_go_back_and_forth(make):
    expected = by_hand(make, EPOCHS + 2)
    loader = RepeatingLoader(make())
    states = []
    for _ in range(len(expected) // 2):
        states.append(loader.state_dict())
        next(loader)
    for stop in (1, len(states) - 1, 0, len(states) // 2):
        loader.load_state_dict(states[stop])
        assert take(loader, 3) == expected[stop : stop + 3]


def test_taking_a_state_changes_nothing():
    expected = by_hand(own_generator)
    loader = RepeatingLoader(own_generator())
    seen = []
    for _ in expected:
        loader.state_dict()
        seen += take(loader, 1)
        loader.state_dict()
    assert seen == expected


def test_a_state_is_a_snapshot():
    loader = RepeatingLoader(own_generator())
    take(loader, 1)
    state = loader.state_dict()
    before = through_a_file(state)
    take(loader, 9)
    assert through_a_file(state) == before
    again = RepeatingLoader(own_generator())
    again.load_state_dict(state)
    state["generators"].clear()
    state["segments"].clear()
    assert take(again, 2) == by_hand(own_generator)[1:3]


def test_a_state_is_small_and_json():
    loader = RepeatingLoader(DataLoader(range(10**6), batch_size=10, shuffle=True))
    take(loader, 1)
    assert len(json.dumps(loader.state_dict())) < 500


def test_a_shuffling_loader_without_a_generator():
    torch.manual_seed(1)
    source = DataLoader(range(SIZE), batch_size=2, shuffle=True)
    loader = RepeatingLoader(source)

    def by_hand_seeded(epochs):
        for epoch in range(epochs):
            torch.manual_seed(mixed(loader.seed, epoch, -1))
            order = list(RandomSampler(range(SIZE)))
            yield from (order[start : start + 2] for start in range(0, SIZE, 2))

    expected = list(by_hand_seeded(EPOCHS))
    assert take(loader, 6) == expected[:6]
    state = loader.state_dict()
    torch.manual_seed(99)  # whatever happens to the global generator
    resumed = RepeatingLoader(DataLoader(range(SIZE), batch_size=2, shuffle=True))
    resumed.load_state_dict(state)
    assert take(resumed, len(expected) - 6) == expected[6:]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_generator_shared_by_loader_and_sampler(stop, workers, persistent):
    def make():
        return RepeatingLoader(
            DataLoader(
                range(SIZE),
                batch_size=2,
                shuffle=True,
                generator=seeded(),
                num_workers=workers,
                persistent_workers=persistent,
            )
        )

    expected = by_hand(own_generator)
    first = make()
    assert take(first, stop) == expected[:stop]
    second = make()
    second.load_state_dict(first.state_dict())
    assert take(second, len(expected) - stop) == expected[stop:]


def test_skipping_loads_nothing():
    loaded = []

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            loaded.append(index)
            return index

    first = RepeatingLoader(DataLoader(Dataset(), batch_size=10, shuffle=True, generator=seeded()))
    take(first, 7)
    rest = RepeatingLoader(DataLoader(Dataset(), batch_size=10, shuffle=True, generator=seeded()))
    rest.load_state_dict(first.state_dict())
    loaded.clear()
    batch = take(rest, 1)
    assert loaded == batch[0]


# Wrong states


@pytest.fixture
def loader():
    loader = RepeatingLoader(own_generator())
    take(loader, 1)
    return loader


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, r"\['epoch'\] must be an integer of at least 0, not -1"),
        ({"epoch": 1.0}, r"\['epoch'\] must be an integer"),
        ({"batch": True}, r"\['batch'\] must be an integer"),
        ({"batch": "3"}, r"\['batch'\] must be an integer"),
        ({"version": 1}, "has version 1, but this release reads 2"),
        ({"version": 3}, "has version 3, but this release reads 2"),
        ({"seed": None}, r"\['seed'\] must be an integer"),
        ({"step": -2}, r"\['step'\] must be an integer of at least 0, not -2"),
        ({"left_out": 0.5}, r"\['left_out'\] must be an integer"),
        ({"samples": "7"}, r"\['samples'\] must be an integer"),
        ({"world_size": 0}, r"\['world_size'\] must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, r"\['batch_size'\] must be an integer of at least 1, not 0"),
        ({"length": [7]}, r"\['length'\] must be an integer"),
        ({"segments": [[1, 2]]}, r"\['segments'\] must be a list of \[ranks, batch size, samples\]"),
        ({"segments": 5}, r"\['segments'\] must be a list"),
        ({"segments": [["1", 2, 0]]}, r"\['segments'\] must be a list"),
        ({"segments": [[1, 2, 1]]}, r"\['segments'\].* contradicts"),
        ({"segments": [[1, 2, 0], [1, 2, 9]]}, r"\['segments'\].* contradicts"),
        ({"segments": [[1, 2, 0], [1, 2, 2], [1, 2, 1]]}, r"\['segments'\].* contradicts"),
        ({"segments": [[1, 3, 0]]}, r"\['segments'\].* contradicts"),
        ({"first": 5}, r"\['first'\] must be \[rank, checksum\] or None, not 5"),
        ({"first": [1, 2, 3]}, r"\['first'\] must be \[rank, checksum\]"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"generators": []}, r"has 0 state\(s\), but the loader and its samplers have 1 generator\(s\)"),
        ({"generators": None}, "not NoneType"),
        ({"generators": ["AAAA"]}, r"\['generators'\]\[0\] is no state of a Generator"),
        ({"generators": ["x"]}, r"\['generators'\]\[0\] is no state of a Generator"),
        ({"generators": [7]}, r"\['generators'\]\[0\] is no state of a Generator"),
        ({"loader": {"a": 1}}, "saved with another kind of loader: .* but DataLoader keeps none"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_changed(loader, change, message):
    expected = by_hand(own_generator)
    with pytest.raises(LoaderStateError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    assert take(loader, len(expected) - 1) == expected[1:]


@pytest.mark.parametrize("key", ["version", *(entry.name for entry in dataclasses.fields(Ledger))])
def test_a_missing_key_is_refused(loader, key):
    state = loader.state_dict()
    del state[key]
    with pytest.raises(LoaderStateError, match=rf"missing keys \['{key}'\]"):
        loader.load_state_dict(state)


def test_no_dict_is_refused(loader):
    with pytest.raises(LoaderStateError, match="must be a dict, not NoneType"):
        loader.load_state_dict(None)


@pytest.mark.parametrize("make", [lambda n: list(range(n)), lambda n: DataLoader(range(n), batch_size=1)])
@pytest.mark.parametrize(("saved", "here"), [(5, 2), (5, 6)])
def test_other_data_is_refused_by_its_length(make, saved, here):
    long = RepeatingLoader(make(saved))
    take(long, 4)
    other = RepeatingLoader(make(here))
    take(other, 1)
    with pytest.raises(LoaderStateError, match=f"length: {saved} in the state, {here} here"):
        other.load_state_dict(long.state_dict())
    assert take(other, 1) == as_lists(make(here))[1:2]


def test_less_data_than_was_handed_out():
    class Lines(IterableDataset):
        """Does not know its length."""

        def __init__(self, count):
            self.count = count

        def set_epoch(self, epoch):
            pass

        def __iter__(self):
            return iter(range(self.count))

    long = RepeatingLoader(DataLoader(Lines(5), batch_size=1))
    take(long, 4)
    short = RepeatingLoader(DataLoader(Lines(2), batch_size=1))
    short.load_state_dict(long.state_dict())
    for _ in range(2):
        with pytest.raises(LoaderStateError, match="4 batches of this epoch were handed out, but the source has 2"):
            next(short)

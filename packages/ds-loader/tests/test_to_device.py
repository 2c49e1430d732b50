"""Batches that are copied to a device, one ahead."""

import collections
import itertools
import json

import pytest
import torch
from ds_loader import EmptyLoaderError, RepeatingLoader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

SIZE = 7
Pair = collections.namedtuple("Pair", ["x", "y"])


class Stream(IterableDataset):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([100 * self.epoch + n for n in range(SIZE)])


class Stateful:
    """A loader that resumes by its own state, and counts what it loaded."""

    def __init__(self):
        self.at = 0
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        while self.at < SIZE:
            self.at += 1
            yield torch.tensor(100 * self.epoch + self.at)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Broken(Dataset):
    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError(f"sample {index}")
        return index


SOURCES = {
    "list": lambda: [torch.tensor(n) for n in range(SIZE)],
    "distributed": lambda: DataLoader(range(SIZE), batch_size=2, sampler=DistributedSampler(range(SIZE), 2, 1, seed=3)),
    "shuffled": lambda: DataLoader(range(SIZE), batch_size=2, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "stateful": Stateful,
    "workers": lambda: DataLoader(range(SIZE), batch_size=2, shuffle=True, num_workers=2),
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def take(loader, count):
    return [batch.tolist() for batch in itertools.islice(loader, count)]


def resumed(source, state, **options):
    loader = RepeatingLoader(source, **options)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


# On the CPU


@every_source
def test_the_batches_are_the_same(make):
    expected = RepeatingLoader(make())
    loader = RepeatingLoader(make(), to_device="cpu")
    for batch in take(expected, 20):
        assert take(loader, 1) == [batch]
        assert (loader.epoch, loader.batch, loader.step) != (0, 0, 0)
    assert (loader.epoch, loader.batch, loader.step) == (expected.epoch, expected.batch, expected.step)
    expected.close()
    loader.close()


@every_source
def test_resuming_at_every_stop(make):
    """The loader is one batch ahead; a state is not."""
    source = RepeatingLoader(make())
    expected = take(source, 21)
    source.close()
    for stop in range(0, 16, 5 if make is SOURCES["workers"] else 1):
        first = RepeatingLoader(make(), to_device="cpu")
        assert take(first, stop) == expected[:stop]
        state = first.state_dict()
        assert take(first, 1) == expected[stop : stop + 1]
        for options in ({"to_device": "cpu"}, {}):
            second = resumed(make(), state, **options)
            assert (second.epoch, second.batch, second.step) == (state["epoch"], state["batch"], stop)
            assert take(second, 5) == expected[stop : stop + 5], f"stopped after {stop}"
            second.close()
        first.close()


@pytest.mark.parametrize("limit", [{"max_steps": 9}, {"max_epochs": 2}])
@every_source
def test_limits(make, limit):
    bare = RepeatingLoader(make(), **limit)
    expected = take(bare, 30)
    loader = RepeatingLoader(make(), to_device="cpu", **limit)
    assert take(loader, 30) == expected
    assert take(loader, 1) == []
    bare.close()
    loader.close()


def test_an_empty_loader():
    for _ in range(2):
        with pytest.raises(EmptyLoaderError):
            next(RepeatingLoader([], to_device="cpu"))


@pytest.mark.parametrize("at", [0, 3, SIZE - 1])
def test_an_error_comes_when_its_turn_has_come(at):
    loader = RepeatingLoader(DataLoader(Broken(at)), to_device="cpu")
    assert take(loader, at) == [[n] for n in range(at)]
    for _ in range(2):
        with pytest.raises(OSError, match=f"sample {at}"):
            next(loader)
    rest = [[n] for n in [*range(at + 1, SIZE), *range(SIZE)] if n != at]
    assert take(loader, SIZE - 1 - at) == rest[: SIZE - 1 - at]
    assert loader.state_dict()["left_out"] == 1


@pytest.mark.parametrize("limit", [{}, {"max_epochs": 2}, {"max_steps": 12}])
@pytest.mark.parametrize("at", [0, 3, SIZE - 1])
def test_on_error_skip(at, limit):
    loader = RepeatingLoader(DataLoader(Broken(at)), to_device="cpu", on_error="skip", **limit)
    assert take(loader, 12) == [[n] for n in range(SIZE) if n != at] * 2
    assert take(loader, 1) == ([] if limit else [[int(at == 0)]])


def test_a_state_behind_a_batch_that_was_left_out():
    first = RepeatingLoader(DataLoader(Broken(3)), to_device="cpu", on_error="skip")
    take(first, 4)
    second = resumed(DataLoader(Broken(3)), first.state_dict(), to_device="cpu", on_error="skip")
    assert take(second, 4) == take(first, 4) == [[5], [6], [0], [1]]


def test_an_exception_is_handed_on_as_it_was():
    error = KeyError("mine")

    class Raises:
        def set_epoch(self, epoch):
            pass

        def __iter__(self):
            raise error
            yield

    with pytest.raises(KeyError) as caught:
        next(RepeatingLoader(Raises(), to_device="cpu"))
    assert caught.value is error


# What is moved


class Encoding(collections.UserDict):
    """As tokenizers give: moves itself."""

    moved_to = None

    def to(self, device):
        self.moved_to = device
        return self


def test_containers_keep_their_kind():
    tensor = torch.arange(3)
    batch = {
        "list": [tensor, 1, "text"],
        "tuple": (tensor, None),
        "named": Pair(tensor, [tensor]),
        "ordered": collections.OrderedDict(a=tensor),
        "encoding": Encoding(ids=tensor),
    }
    (moved,) = itertools.islice(RepeatingLoader([batch], to_device="cpu"), 1)
    assert moved.keys() == batch.keys()
    assert moved["list"][1:] == [1, "text"]
    assert moved["tuple"][1] is None
    assert isinstance(moved["named"], Pair)
    assert isinstance(moved["ordered"], collections.OrderedDict)
    assert moved["encoding"] is batch["encoding"]
    assert moved["encoding"].moved_to == torch.device("cpu")
    for found in (moved["list"][0], moved["tuple"][0], moved["named"].x, moved["named"].y[0], moved["ordered"]["a"]):
        assert torch.equal(found, tensor)


def test_a_device_without_values():
    loader = RepeatingLoader(DataLoader(range(SIZE), batch_size=2), to_device="meta")
    assert [tuple(batch.shape) for batch in itertools.islice(loader, 5)] == [(2,), (2,), (2,), (1,), (2,)]
    assert next(loader).device.type == "meta"


# On a GPU


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def slow(milliseconds=5):
    torch.cuda._sleep(int(milliseconds * 1_000_000))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("make", [SOURCES[name] for name in ("shuffled", "stream", "stateful", "workers")])
def test_values_on_a_gpu(cuda, make, pinned):
    source = make()
    if pinned and isinstance(source, DataLoader):
        source.pin_memory = True
    bare = RepeatingLoader(make())
    expected = take(bare, 20)
    loader = RepeatingLoader(source, to_device="cuda")
    batches = list(itertools.islice(loader, 20))
    assert {batch.device for batch in batches} == {cuda}
    assert [batch.tolist() for batch in batches] == expected
    bare.close()
    loader.close()


@pytest.mark.gpu
def test_a_consumer_that_is_slow_reads_the_right_values(cuda):
    """Its kernels are queued long before they run; the memory of a batch must not be used again until then."""
    count, size = 60, 1 << 20
    source = [torch.full((size,), float(n)) for n in range(count)]
    loader = RepeatingLoader(source, to_device=cuda)
    sums = []
    for _ in range(2 * count):
        batch = next(loader)
        slow(2)
        sums.append(batch.sum())
        del batch
    assert [value.item() / size for value in sums] == [float(n) for n in range(count)] * 2


@pytest.mark.gpu
def test_a_consumer_on_a_stream_of_its_own(cuda):
    size = 1 << 20
    loader = RepeatingLoader([torch.full((size,), float(n)) for n in range(20)], to_device=cuda)
    stream, sums = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for _ in range(40):
            batch = next(loader)
            slow(2)
            sums.append(batch.sum())
            del batch
    stream.synchronize()
    assert [value.item() / size for value in sums] == [float(n) for n in range(20)] * 2


@pytest.mark.gpu
def test_a_producer_that_writes_over_its_batch_changes_nothing(cuda):
    """Pinned memory that a loader reuses is copied before it is written again, if the loader waits for that."""

    class Fresh:
        def set_epoch(self, epoch):
            pass

        def __iter__(self):
            for n in range(30):
                yield torch.full((1 << 18,), float(n)).pin_memory()

    loader = RepeatingLoader(Fresh(), to_device=cuda)
    sums = []
    for _ in range(30):
        slow(1)
        sums.append(next(loader).mean())
    assert [value.item() for value in sums] == [float(n) for n in range(30)]


@pytest.mark.gpu
def test_memory_is_flat_over_1000_epochs(cuda):
    source = [torch.zeros(1 << 16) for _ in range(4)]
    loader = RepeatingLoader(source, to_device=cuda)

    def epochs(count):
        for _ in range(4 * count):
            next(loader)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    epochs(10)
    before = epochs(10)
    assert epochs(1000) == before


@pytest.mark.gpu
def test_nested_containers_on_a_gpu(cuda):
    class Holds:
        """Moves into a new object."""

        def __init__(self, ids):
            self.ids = ids

        def to(self, device):
            return Holds(self.ids.to(device, non_blocking=True))

    batch = {
        "a": [torch.ones(2), {"b": (torch.ones(3), "text")}],
        "named": Pair(torch.ones(1), 3),
        "o": Holds(torch.ones(4)),
    }
    (moved,) = itertools.islice(RepeatingLoader([batch], to_device=cuda), 1)
    tensors = [moved["a"][0], moved["a"][1]["b"][0], moved["named"].x, moved["o"].ids]
    assert {tensor.device for tensor in tensors} == {cuda}
    assert [tensor.sum().item() for tensor in tensors] == [2.0, 3.0, 1.0, 4.0]
    assert (moved["a"][1]["b"][1], moved["named"].y) == ("text", 3)
    assert batch["a"][0].device.type == "cpu"


@pytest.mark.gpu
def test_the_memory_of_an_object_is_kept_for_a_slow_consumer(cuda):
    class Encoded(collections.UserDict):
        def to(self, device):
            return Encoded({key: value.to(device, non_blocking=True) for key, value in self.items()})

    size = 1 << 20
    loader = RepeatingLoader([Encoded(ids=torch.full((size,), float(n))) for n in range(30)], to_device=cuda)
    sums = []
    for _ in range(60):
        batch = next(loader)
        slow(2)
        sums.append(batch["ids"].sum())
        del batch
    assert [value.item() / size for value in sums] == [float(n) for n in range(30)] * 2

"""torchdata's StatefulDataLoader over all that keeps a state, or keeps none, in and below it."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("torchdata") is None:
    pytest.skip("needs torchdata", allow_module_level=True)

from ds_loader import LoaderStateError, LoaderWarning, RepeatingLoader
from loops import (
    by_hand,
    check_back_and_forth,
    check_epochs,
    check_resume,
    go_on,
    plain,
    repeated,
    seeded,
    states_at,
    take,
)
from ranks import run_ranks
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler, StatefulDistributedSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # workers are forked beside threads
]
SIZE = 11


def own_share(numbers: Any) -> list[int]:
    """Those of a worker."""
    worker = torch.utils.data.get_worker_info()
    return list(numbers) if worker is None else list(numbers)[worker.id :: worker.num_workers]


class Stateless(IterableDataset):
    """Another order every epoch, by a generator object."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        order = torch.randperm(SIZE, generator=seeded(self.epoch)).tolist()
        return own_share(100 * self.epoch + number for number in order)

    def __iter__(self) -> Any:
        yield from self.order()


class Keeping(Stateless):
    """The dataset knows where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0

    def __iter__(self) -> Any:
        for number in self.order()[self.at :]:
            self.at += 1
            yield number
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Cursor:
    """An iterator that knows where it is."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.at = order, 0

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> int:
        if self.at == len(self.order):
            raise StopIteration
        self.at += 1
        return self.order[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class ByCursor(Stateless):
    """Its iterator knows where it is."""

    def __iter__(self) -> Any:
        return Cursor(self.order())


class PlainCursor(Stateless):
    """Its iterator is of a class, and keeps no state."""

    def __iter__(self) -> Any:
        return iter(self.order())


class Counting(Dataset):
    """A map-style dataset whose items depend on how many were asked for before."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> list[int]:
        self.asked += 1
        return [index, self.asked]

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


class Steps(Sampler):
    """A sampler with a cursor of its own: it goes on where it was left."""

    def __init__(self) -> None:
        self.at = self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = torch.randperm(SIZE, generator=seeded(self.epoch)).tolist()
        while self.at < SIZE:
            self.at += 1
            yield order[self.at - 1]
        self.at = 0

    def __len__(self) -> int:
        return SIZE

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class OfRanks(StatefulDataLoader):
    """Keeps its state by rank and pickled, as torchtitan's ``ParallelAwareDataloader`` does; written anew here."""

    ranks, rank = 2, 1

    def state_dict(self) -> dict[str, Any]:
        return {f"dp_rank_{self.rank}": pickle.dumps(super().state_dict()), "world_size": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            assert state["world_size"] == self.ranks
            super().load_state_dict(pickle.loads(state[f"dp_rank_{self.rank}"]))


def distributed(kind: Any = DistributedSampler) -> Any:
    return kind(range(SIZE), num_replicas=2, rank=1, seed=3)


STREAMS = {"stateless": Stateless, "stateful": Keeping, "stateful iterator": ByCursor, "plain iterator": PlainCursor}
SAMPLERS = {
    "torch's random": lambda: RandomSampler(range(SIZE), generator=seeded()),
    "torchdata's random": lambda: StatefulRandomSampler(range(SIZE), generator=seeded()),
    "torch's distributed": distributed,
    "torchdata's distributed": lambda: distributed(StatefulDistributedSampler),
    "with a cursor": Steps,
}
LOADERS: dict[str, Any] = {
    **{name: lambda kind=kind: StatefulDataLoader(kind(), batch_size=2) for name, kind in STREAMS.items()},
    **{
        name: lambda make=make: StatefulDataLoader(range(SIZE), batch_size=2, sampler=make())
        for name, make in SAMPLERS.items()
    },
    "a sampler with a cursor in a DataLoader": lambda: DataLoader(range(SIZE), batch_size=2, sampler=Steps()),
    "a batch sampler with a cursor": lambda: StatefulDataLoader(range(SIZE), batch_size=None, sampler=Steps()),
    "stateful dataset": lambda: StatefulDataLoader(Counting(), batch_size=2, sampler=distributed()),
    "stateful dataset, shuffled": lambda: StatefulDataLoader(Counting(), sampler=SAMPLERS["torch's random"]()),
    "stateful, by rank": lambda: OfRanks(Keeping(), batch_size=2),
    "stateless, by rank": lambda: OfRanks(Stateless(), batch_size=2),
    "stateful iterator, by rank": lambda: OfRanks(ByCursor(), batch_size=2),
    "map style, by rank": lambda: OfRanks(range(SIZE), batch_size=2, sampler=distributed()),
}
WORKERS: dict[str, Any] = {
    **STREAMS,
    "distributed": lambda: range(SIZE),
}


def with_workers(name: str, **options: Any) -> Any:
    def make() -> Any:
        sampler = {"sampler": distributed()} if name == "distributed" else {}
        return StatefulDataLoader(WORKERS[name](), batch_size=2, num_workers=2, **sampler, **options)

    return make


def counted_by_hand(name: str) -> list[list[Any]]:
    """The batches of a plain DataLoader, whose epochs end where they end; it takes the same parts."""
    made = LOADERS[name]()
    if isinstance(made.dataset, Counting):
        return by_hand(lambda: made)
    if name == "a batch sampler with a cursor":
        return by_hand(lambda: DataLoader(made.dataset, batch_size=None, sampler=made.sampler))
    sampler = {} if isinstance(made.dataset, IterableDataset) else {"sampler": made.sampler}
    return by_hand(lambda: DataLoader(made.dataset, batch_size=made.batch_size, **sampler))


@pytest.mark.parametrize("name", LOADERS)
def test_epochs(name: str) -> None:
    check_epochs(LOADERS[name], counted_by_hand(name))


@pytest.mark.parametrize("name", LOADERS)
def test_resuming_at_every_stop(name: str) -> None:
    check_resume(LOADERS[name], counted_by_hand(name))


@pytest.mark.parametrize("name", LOADERS)
def test_going_back_and_forth(name: str) -> None:
    check_back_and_forth(LOADERS[name], counted_by_hand(name))


@pytest.mark.parametrize("name", WORKERS)
def test_resuming_with_workers(name: str) -> None:
    make = with_workers(name)
    epochs = by_hand(lambda: with_workers(name)() if name == "distributed" else told_by_copies(name))
    check_resume(make, epochs, [2, len(epochs[0]) - 1, len(epochs[0])], between=3)


def told_by_copies(name: str) -> Any:
    """A plain DataLoader: its workers are started anew for each epoch, with a dataset that heard of it."""
    return DataLoader(WORKERS[name](), batch_size=2, num_workers=2)


def test_resuming_with_workers_by_rank() -> None:
    def make() -> Any:
        return OfRanks(Keeping(), batch_size=2, num_workers=2)

    epochs = by_hand(lambda: told_by_copies("stateful"))
    check_resume(make, epochs, [1, len(epochs[0]) - 1, len(epochs[0])])


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", ["stateful", "stateless"])
def test_snapshots_of_every_third_step(name: str, persistent: bool) -> None:
    make = with_workers(name, snapshot_every_n_steps=3, persistent_workers=persistent)
    epochs = by_hand(lambda: told_by_copies(name))
    check_epochs(make, epochs)
    check_resume(make, epochs, [4, len(epochs[0])], between=1)


def test_in_another_process() -> None:
    stop = 7
    states = states_at(LOADERS, stop)
    streams = {name: list(itertools.chain(*counted_by_hand(name))) for name in LOADERS}
    expected = {name: stream[stop : stop + 2] for name, stream in streams.items()}
    assert run_ranks(process, 1, states, init=False)[0] == expected


def process(rank: int, states: dict[str, bytes]) -> Any:
    return go_on(LOADERS, states, 2)


@pytest.mark.parametrize("name", ["stateful", "stateful iterator", "stateful dataset", "stateful, by rank"])
def test_a_state_of_the_library_is_used_where_there_is_one(name: str) -> None:
    loader = repeated(LOADERS[name]())
    take(loader, 2)
    assert loader.state_dict()["loader"] is not None


def test_somebody_else_advances_the_loader() -> None:
    loader = repeated(StatefulDataLoader(Keeping(), batch_size=2))
    take(loader, 2)
    next(loader._iterator.iterator)  # type: ignore[attr-defined]
    with pytest.raises(LoaderStateError, match="3 batches of epoch 0 were handed out, but 2 were handed out here"):
        loader.state_dict()


# Loaders of no library


class NoState:
    """``state_dict`` gives None until something was trained, say."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        yield from (10 * self.epoch + number for number in range(4))

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("there is none")


class LoadOnly(NoState):
    """It cannot say where it is."""

    state_dict = None  # type: ignore[assignment]


class Whole(Keeping):
    """A loader whose own state tells all."""


@pytest.mark.parametrize("make", [NoState, LoadOnly, Whole])
def test_loaders_of_no_library(make: Any) -> None:
    epochs = by_hand(make)
    check_epochs(make, epochs)
    check_resume(make, epochs)
    check_back_and_forth(make, epochs)


# Order and end


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("dataset", [lambda: range(SIZE), Stateless])
def test_batches_out_of_order_are_told(kind: Any, dataset: Any) -> None:
    with pytest.warns(LoaderWarning, match=f"{kind.__name__}: cannot resume exactly, because in_order=False"):
        RepeatingLoader(kind(dataset(), batch_size=2, num_workers=2, in_order=False))


class Endless(IterableDataset):
    """Counts for ever."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while True:
            self.at += 1
            yield self.at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_stream(workers: int) -> None:
    def make() -> Any:
        return StatefulDataLoader(Endless(), batch_size=2, num_workers=workers)

    stream = [plain(batch) for batch in itertools.islice(make(), 12)]
    check_resume(make, [stream], [0, 1, 5], between=3)
    first = repeated(make(), max_steps=7)
    assert take(first, 5) == stream[:5]
    second = repeated(make(), max_steps=7)
    second.load_state_dict(first.state_dict())
    assert [plain(batch) for batch in second] == stream[5:7]
    assert (second.epoch, second.step) == (0, 7)
    first.close()
    second.close()

"""torchdata's nodes: a `Loader` over pipelines that count epochs by themselves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("torchdata") is None:
    pytest.skip("needs torchdata", allow_module_level=True)

from ds_loader import LoaderStateError, LoaderWarning, RepeatingLoader
from loops import by_hand, check_back_and_forth, check_epochs, check_resume, go_on, repeated, seeded, states_at, take
from ranks import run_ranks
from torch.utils.data import DistributedSampler, RandomSampler
from torchdata import nodes
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler, StatefulDistributedSampler

SIZE = 7

# Where the garbage collector ends a mapper in one of its own threads.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*ParallelMapperIter:pytest.PytestUnraisableExceptionWarning"
)


def distributed(seed: int = 3) -> Any:
    return DistributedSampler(range(SIZE), num_replicas=2, rank=1, seed=seed)


def shuffled() -> Any:
    return RandomSampler(range(SIZE), generator=seeded())


def squared(x: int) -> int:
    return x * x


class Rows:
    """Counts its rows by itself."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < SIZE:
            self.at += 1
            yield self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def mixed(criterion: str) -> Any:
    sources = {
        "a": nodes.MapStyleWrapper(list(range(SIZE)), distributed()),
        "b": nodes.IterableWrapper(range(100, 100 + SIZE)),
        "c": nodes.SamplerWrapper(shuffled()),
    }
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    return nodes.MultiNodeWeightedSampler(sources, weights, getattr(nodes.StopCriteria, criterion), 0, 1, seed=11)


ROOTS = {
    "iterable": lambda: nodes.IterableWrapper(range(SIZE)),
    "iterable with a state": lambda: nodes.IterableWrapper(Rows()),
    "map style, distributed": lambda: nodes.MapStyleWrapper([10 * x for x in range(SIZE)], distributed()),
    "map style, random": lambda: nodes.MapStyleWrapper([10 * x for x in range(SIZE)], shuffled()),
    "sampler with a state": lambda: nodes.SamplerWrapper(StatefulDistributedSampler(range(SIZE), 2, 1, seed=3)),
    "random with a state": lambda: nodes.SamplerWrapper(StatefulRandomSampler(range(SIZE), generator=seeded())),
    "batches": lambda: nodes.Batcher(nodes.SamplerWrapper(distributed()), 3, drop_last=False),
    "threads": lambda: nodes.ParallelMapper(
        nodes.Batcher(nodes.SamplerWrapper(shuffled()), 2, drop_last=False), tuple, num_workers=2, method="thread"
    ),
    "prefetched": lambda: nodes.Prefetcher(
        nodes.ParallelMapper(nodes.SamplerWrapper(distributed()), squared, num_workers=2, method="thread"), 2
    ),
    "snapshots": lambda: nodes.Prefetcher(nodes.SamplerWrapper(distributed()), 2, snapshot_frequency=3),
    "mixed until the first ends": lambda: mixed("FIRST_DATASET_EXHAUSTED"),
    "mixed until all ended": lambda: mixed("ALL_DATASETS_EXHAUSTED"),
    "mixed in cycles": lambda: nodes.Batcher(mixed("CYCLE_UNTIL_ALL_DATASETS_EXHAUSTED"), 3, drop_last=False),
    "mixed in cycles, prefetched": lambda: nodes.Prefetcher(mixed("CYCLE_UNTIL_ALL_DATASETS_EXHAUSTED"), 2),
}
LOADERS = {name: lambda root=root: nodes.Loader(root()) for name, root in ROOTS.items()}


THREADED = [name for name in ROOTS if name in ("threads", "snapshots") or "prefetched" in name]  # they end slowly


def around_ends(epochs: list[list[Any]]) -> list[int]:
    """After how many items two epochs are nearly over, over, and begun."""
    first = len(epochs[0])
    second = first + len(epochs[1])
    return [2, first - 1, first, second]


def nothing(loader: Any, epoch: int) -> None:
    """The nodes count."""


def expected_of(name: str, epochs: int = 4) -> list[list[Any]]:
    return by_hand(LOADERS[name], epochs, nothing)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("name", ROOTS)
def test_epochs(name: str, restart: bool) -> None:
    check_epochs(lambda: nodes.Loader(ROOTS[name](), restart_on_stop_iteration=restart), expected_of(name))


@pytest.mark.parametrize("name", ROOTS)
def test_resuming_at_every_stop(name: str) -> None:
    epochs = expected_of(name)
    check_resume(LOADERS[name], epochs, around_ends(epochs) if name in THREADED else range(sum(map(len, epochs[:3]))))


@pytest.mark.parametrize("name", ["iterable", "map style, distributed", "snapshots", "mixed in cycles"])
def test_resuming_a_loader_that_does_not_restart(name: str) -> None:
    epochs = expected_of(name)
    check_resume(lambda: nodes.Loader(ROOTS[name](), restart_on_stop_iteration=False), epochs, around_ends(epochs)[-4:])


@pytest.mark.parametrize("name", ROOTS)
def test_going_back_and_forth(name: str) -> None:
    check_back_and_forth(LOADERS[name], expected_of(name, 3))


def test_in_another_process() -> None:
    stop = 12
    states = states_at(LOADERS, stop)
    streams = {name: [item for epoch in expected_of(name, 9) for item in epoch] for name in LOADERS}
    expected = {name: stream[stop : stop + 6] for name, stream in streams.items()}
    assert run_ranks(process, 1, states, init=False)[0] == expected


def process(rank: int, states: dict[str, bytes]) -> Any:
    return go_on(LOADERS, states, 6)


def test_a_sampler_without_a_generator_goes_on_with_the_same_orders() -> None:
    def make() -> Any:
        return nodes.Loader(nodes.SamplerWrapper(RandomSampler(range(SIZE))))

    epochs = [take(repeated(make(), seed=1), 4 * SIZE)[SIZE * epoch :][:SIZE] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    check_resume(make, epochs, seed=1)


@pytest.mark.parametrize("name", ["map style, distributed", "batches", "prefetched"])
def test_the_node_s_epoch_is_the_ledger_s(name: str) -> None:
    first = repeated(LOADERS[name](), max_epochs=2)
    list(first)
    second = repeated(LOADERS[name]())
    second.load_state_dict(first.state_dict())
    assert take(second, len(expected_of(name)[2])) == expected_of(name)[2]


def test_a_state_asked_for_before() -> None:
    loader = LOADERS["map style, distributed"]()
    loader.state_dict()
    first = repeated(LOADERS["map style, distributed"]())
    take(first, 2)
    second = repeated(loader)
    second.load_state_dict(first.state_dict())
    assert take(second, 2) == expected_of("map style, distributed")[0][2:4]


def test_an_epoch_count_of_its_own_is_told() -> None:
    loader = nodes.Loader(nodes.SamplerWrapper(distributed(), initial_epoch=5))
    with pytest.warns(LoaderWarning, match="Loader: initial_epoch and epoch_updater of SamplerWrapper have no effect"):
        RepeatingLoader(loader)


@pytest.mark.parametrize("restarts", [False, True])
def test_somebody_else_advances_the_loader(restarts: bool) -> None:
    source = LOADERS["map style, distributed"]()
    loader = repeated(source)
    take(loader, 2)
    if restarts:
        next(iter(source))
    else:
        next(source._it)
    with pytest.raises(LoaderStateError, match="somebody else iterates Loader, too"):
        loader.state_dict()


def test_the_loader_is_left_as_it_was() -> None:
    source = nodes.Loader(ROOTS["iterable"](), restart_on_stop_iteration=True)
    take(repeated(source), SIZE + 2)
    assert source.restart_on_stop_iteration

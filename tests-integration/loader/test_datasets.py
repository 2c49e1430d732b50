"""Hugging Face datasets: tables and streams, alone, in a DataLoader and in a StatefulDataLoader."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("datasets") is None or importlib.util.find_spec("torchdata") is None:
    pytest.skip("needs datasets and torchdata", allow_module_level=True)

import datasets
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from datasets.distributed import split_dataset_by_node
from ds_loader import LoaderStateError, RepeatingLoader
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
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # workers are forked beside threads of arrow
]
datasets.disable_progress_bars()
logging.getLogger("datasets").setLevel(logging.ERROR)  # it tells of every shuffle buffer that it fills again


def rows(size: int = 8, start: int = 0) -> Any:
    return Dataset.from_dict({"x": list(range(start, start + size))})


def generated(shards: list[int]) -> Any:
    for shard in shards:
        yield from ({"x": 10 * shard + at} for at in range(3))


def from_generator() -> Any:
    return IterableDataset.from_generator(generated, gen_kwargs={"shards": [0, 1, 2, 3]})


def stream(shards: int = 4) -> Any:
    return rows(12).to_iterable_dataset(num_shards=shards)


def plus(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"] + 100}


def plus_all(batch: dict[str, Any]) -> dict[str, Any]:
    return {"x": [x + 100 for x in batch["x"]]}


def twice(batch: dict[str, Any]) -> dict[str, Any]:
    return {"x": [x for x in batch["x"] for _ in range(2)]}


def odd(row: dict[str, Any]) -> bool:
    return bool(row["x"] % 2)


TABLES = {
    "itself": rows,
    "a DataLoader": lambda: DataLoader(rows().with_format("torch"), batch_size=3),
    "shuffled": lambda: DataLoader(rows(), batch_size=3, sampler=RandomSampler(range(8), generator=seeded())),
    "distributed": lambda: DataLoader(rows(), batch_size=2, sampler=DistributedSampler(rows(), 2, 1, seed=3)),
    "mapped": lambda: DataLoader(rows().map(plus).shuffle(seed=1).select(range(7)), batch_size=3),
    "stateful": lambda: StatefulDataLoader(rows().with_format("torch"), batch_size=3),
    "stateful, distributed": lambda: StatefulDataLoader(
        rows(), batch_size=2, sampler=DistributedSampler(rows(), 2, 1, seed=3)
    ),
}
BY_STATE = {
    "from_generator": from_generator,
    "to_iterable_dataset": stream,
    "one shard": lambda: stream(1),
    "map": lambda: from_generator().map(plus),
    "filter": lambda: stream().map(plus).filter(odd),
    "map in batches": lambda: stream().map(plus_all, batched=True, batch_size=5),
    "map to more": lambda: from_generator().map(twice, batched=True, batch_size=2),
    "batch": lambda: stream().batch(5),
    "batch, drop_last": lambda: from_generator().map(plus).batch(5, drop_last_batch=True),
    "skip": lambda: stream().skip(3),
    "take": lambda: from_generator().take(7),
    "repeat": lambda: stream().take(3).repeat(2),
    "torch": lambda: stream().with_format("torch"),
    "arrow": lambda: stream().with_format("arrow"),
    "rename": lambda: stream().rename_column("x", "y").select_columns(["y"]),
    "interleave": lambda: interleave_datasets([stream(), from_generator().map(plus)]),
    "interleave by chance": lambda: interleave_datasets(
        [stream(), from_generator().map(plus)], probabilities=[0.3, 0.7], seed=1
    ),
    "interleave all": lambda: interleave_datasets([stream(), stream().take(3)], stopping_strategy="all_exhausted"),
    "concatenate": lambda: concatenate_datasets([stream(), from_generator()]),
    "columns": lambda: concatenate_datasets([stream(), stream().rename_column("x", "y")], axis=1),
    "by node, shards": lambda: split_dataset_by_node(stream(), rank=1, world_size=2),
    "by node, examples": lambda: split_dataset_by_node(stream(), rank=1, world_size=3),
}
BY_BUFFER = {
    "shuffle": lambda: stream().shuffle(seed=3, buffer_size=5),
    "shuffle a generator": lambda: from_generator().shuffle(seed=3, buffer_size=5),
    "shuffle, map, filter": lambda: stream().shuffle(seed=3, buffer_size=5).map(plus).filter(odd),
    "shuffle, batch": lambda: stream().shuffle(seed=3, buffer_size=5).batch(5),
    "shuffle, by node": lambda: split_dataset_by_node(stream().shuffle(seed=3, buffer_size=5), 1, 2),
    "interleave shuffled": lambda: interleave_datasets([stream().shuffle(seed=3, buffer_size=5), from_generator()]),
    "concatenate shuffled": lambda: concatenate_datasets([stream(), from_generator().shuffle(seed=3, buffer_size=5)]),
    "shuffle twice, take": lambda: stream().shuffle(seed=3, buffer_size=3).shuffle(seed=4, buffer_size=3).take(7),
}
STREAMS = {**BY_STATE, **BY_BUFFER}


def in_loader(name: str, kind: Any = DataLoader, **options: Any) -> Any:
    return lambda: kind(STREAMS[name](), batch_size=None if "arrow" in name or "batch" in name else 2, **options)


IN_LOADERS = {name: in_loader(name) for name in STREAMS if name != "rename"}
IN_STATEFUL = {name: in_loader(name, StatefulDataLoader) for name in STREAMS if name != "rename"}
MORE = ["to_iterable_dataset", "filter", "map to more", "batch", "arrow", "take", "interleave by chance", "columns"]
MORE += ["by node, shards", "by node, examples", "shuffle, map, filter", "shuffle, by node", "shuffle twice, take"]
SOME = ["map", "batch", "by node, shards", "shuffle", "interleave shuffled"]


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES.keys())
def test_tables(make: Any) -> None:
    epochs = by_hand(make)
    check_epochs(make, epochs)
    check_resume(make, epochs)


def test_a_generator_shared_by_loader_and_sampler() -> None:
    epochs = by_hand(TABLES["shuffled"])  # where the seeds of workers come from elsewhere
    check_resume(lambda: DataLoader(rows(), batch_size=3, shuffle=True, generator=seeded()), epochs)


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str) -> None:
    epochs = by_hand(STREAMS[name], 2)
    check_epochs(STREAMS[name], epochs)
    check_resume(STREAMS[name], epochs, range(0, sum(map(len, epochs)) - 2, 7))


@pytest.mark.parametrize("name", MORE)
def test_streams_in_a_dataloader(name: str) -> None:
    epochs = by_hand(IN_LOADERS[name], 2)
    check_resume(IN_LOADERS[name], epochs, range(0, sum(map(len, epochs)) - 2, 3))


@pytest.mark.parametrize("name", SOME)
def test_streams_in_a_stateful_dataloader(name: str) -> None:
    epochs = by_hand(IN_LOADERS[name], 2)  # which draws the same, and whose end of an epoch is its end
    check_resume(IN_STATEFUL[name], epochs, range(0, sum(map(len, epochs)) - 2, 3))


@pytest.mark.parametrize("name", ["shuffle", "shuffle, by node", "concatenate shuffled"])
def test_every_epoch_of_a_shuffled_stream_has_another_order(name: str) -> None:
    first, second, third = ([row["x"] for row in epoch] for epoch in by_hand(STREAMS[name]))
    assert first != second != third != first
    loader = repeated(STREAMS[name]())
    assert [row["x"] for row in take(loader, 2 * len(first))] == first + second


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("name", ["map", "shuffle"])
def test_workers_hear_the_epoch(name: str, kind: Any, persistent: bool) -> None:
    epochs = by_hand(in_loader(name, num_workers=2))
    assert any(epoch != epochs[0] for epoch in epochs)
    make = in_loader(name, kind, num_workers=2, persistent_workers=persistent)
    check_epochs(make, epochs)
    check_resume(make, epochs, [1, len(epochs[0])])


@pytest.mark.parametrize("name", ["map", "by node, shards", "shuffle"])
@pytest.mark.parametrize("makes", [STREAMS, IN_LOADERS, IN_STATEFUL], ids=["itself", "DataLoader", "stateful"])
def test_going_back_and_forth(makes: Any, name: str) -> None:
    check_back_and_forth(makes[name], by_hand(makes[name], 3))


@pytest.mark.parametrize("makes", [STREAMS, IN_LOADERS, IN_STATEFUL], ids=["itself", "DataLoader", "stateful"])
def test_epochs_of_a_stream_that_is_not_told_them(makes: Any) -> None:
    make = makes["map"]
    epoch = list(map(plain, make()))
    check_resume(make, [epoch] * 3, range(2 * len(epoch)), set_epoch="off")


def test_in_another_process() -> None:
    makes = {**TABLES, **STREAMS}
    states = states_at(makes, 5)
    expected = {name: [batch for epoch in by_hand(make, 5) for batch in epoch][5:9] for name, make in makes.items()}
    assert run_ranks(process, 1, states, init=False)[0] == expected


def process(rank: int, states: dict[str, bytes]) -> Any:
    return go_on({**TABLES, **STREAMS}, states, 4)


@pytest.mark.parametrize("name", STREAMS)
def test_the_library_s_own_state_is_used_where_it_is_exact(name: str) -> None:
    loader = repeated(STREAMS[name]())
    take(loader, 2)
    assert (loader.state_dict()["loader"] is not None) == (name in BY_STATE)


@pytest.mark.parametrize("shards", [4, 1])
@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: DataLoader(it, batch_size=2), StatefulDataLoader])
def test_another_number_of_nodes_is_refused(wrap: Any, shards: int) -> None:
    first = repeated(wrap(split_dataset_by_node(stream(shards), 0, 2)))
    take(first, 1)
    other = repeated(wrap(split_dataset_by_node(stream(shards), 0, 4)))
    with pytest.raises(LoaderStateError, match="world_size: 2 in the state, 4 here"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", ["map", "shuffle"])
def test_no_warning_where_all_is_exact(name: str) -> None:
    for source in (STREAMS[name](), IN_LOADERS[name](), IN_STATEFUL[name](), rows(), TABLES["shuffled"]()):
        RepeatingLoader(source)

"""DeepSpeed's own loader, made by hand and by an engine, in the place that DeepSpeed's RepeatingLoader has."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_loader import LoaderStateError, LoaderWarning, OneShotLoaderError, RepeatingLoader
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

from ranks import run_ranks
from wrapper_loops import (
    Batches,
    GlobalSampler,
    by_hand,
    plain,
    require_resumes,
    require_shuffled,
    rest_of_epoch,
    seed_all,
    take,
)

SIZE = 23  # no number of ranks or batch size below divides it
EPOCHS = 3
ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}


class Timer:
    """Counts as DeepSpeed's throughput timer is started, once for every batch."""

    def __init__(self) -> None:
        self.starts = 0

    def start(self) -> None:
        self.starts += 1


def loader(seed: int = 0, **options: Any) -> Any:
    """A fresh loader, after the global generators were seeded."""
    from deepspeed.runtime.dataloader import DeepSpeedDataLoader

    seed_all(seed)
    arguments: dict[str, Any] = {
        "dataset": list(range(SIZE)),
        "batch_size": 3,
        "pin_memory": False,
        "local_rank": 0,
        "tput_timer": None,
        "num_local_io_workers": 0,
        "data_parallel_world_size": 2,
        "data_parallel_rank": 1,
    }
    return DeepSpeedDataLoader(**{**arguments, **options})


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def tripled(samples: list[int]) -> torch.Tensor:
    return 3 * torch.tensor(samples)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "distributed": dict,
    "drop last": lambda: {"dataloader_drop_last": True},
    "collated": lambda: {"collate_fn": tripled},
    "timed": lambda: {"tput_timer": Timer()},
    "alone": lambda: {"data_parallel_world_size": 1, "data_parallel_rank": 0},
    "own sampler": lambda: {"data_sampler": RandomSampler(range(SIZE), generator=generator())},
    "own distributed": lambda: {"data_sampler": DistributedSampler(range(SIZE), 4, 2, drop_last=True)},
    "in order": lambda: {"data_sampler": SequentialSampler(range(SIZE))},
    "workers": lambda: {"num_local_io_workers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_a_loop_by_hand_and_every_stop_resumes_in_it(kind: str) -> None:
    options = KINDS[kind]
    by_itself = loader(**options())
    want = by_hand(by_itself, EPOCHS, getattr(by_itself.data_sampler, "set_epoch", None))
    assert len(want) == EPOCHS * len(by_itself)
    stops = range(2 * len(by_itself) + 1) if kind != "workers" else (1, len(by_itself))
    require_resumes(lambda seed: loader(seed, **options()), want, stops)
    first, second = ([batch for at, batch in want if at == epoch] for epoch in range(2))
    assert (first == second) == (kind == "in order")


@pytest.mark.parametrize("sampler", [None, GlobalSampler(SIZE)])
def test_an_order_of_the_global_generators_changes_and_resumes(sampler: Any) -> None:
    """Without a rank, DeepSpeed takes a RandomSampler, and batches for all of a process' devices."""

    def make(seed: int) -> Any:
        return loader(seed, local_rank=-1, batch_size=1, data_sampler=sampler)

    batches = RepeatingLoader(make(0))
    want = take(batches, 3 * len(batches))
    require_shuffled(want, range(SIZE))
    require_resumes(make, want, range(2 * len(batches) + 1))


def test_the_timer_starts_with_every_batch() -> None:
    timer = Timer()
    batches = RepeatingLoader(loader(tput_timer=timer))
    take(batches, 3)
    assert timer.starts == 3


def test_the_loader_itself_stays_as_it_was() -> None:
    given = loader()
    batches = RepeatingLoader(given)
    take(batches, 2)
    assert isinstance(given.data_sampler, DistributedSampler)
    assert len(list(given)) == len(given) == len(batches) == 4
    assert [batch for _, batch in take(batches, 2)] == [plain(batch) for batch in list(loader())[2:]]


class Bad(list[int]):
    """A dataset with a sample that cannot be loaded."""

    def __getitem__(self, place: Any) -> Any:
        if place == 7:
            raise OSError("corrupt")
        return super().__getitem__(place)


def test_an_error_takes_no_batch_but_its_own() -> None:
    given = loader(dataset=Bad(range(SIZE)), data_sampler=SequentialSampler(range(SIZE)))
    batches = RepeatingLoader(given, on_error="skip")
    want = [(0, list(range(n, min(n + 3, SIZE)))) for n in range(0, SIZE, 3) if n != 6]
    assert take(batches, 8) == [*want, (1, [0, 1, 2])]


# Another number of ranks, another batch size


@pytest.mark.parametrize("before", [(2, 3), (4, 1), (1, 5)])
@pytest.mark.parametrize("after", [(3, 2), (1, 4), (4, 3)])
def test_other_ranks_and_batch_sizes_go_on_with_what_nobody_saw(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    def make(rank: int, shape: tuple[int, int]) -> RepeatingLoader[Any]:
        return RepeatingLoader(
            loader(rank, batch_size=shape[1], data_parallel_world_size=shape[0], data_parallel_rank=rank)
        )

    first = [make(rank, before) for rank in range(before[0])]
    seen: list[int] = []
    for batches in first:
        take(batches, len(batches))  # an epoch
        seen += [sample for _, batch in take(batches, 2) for sample in batch]
    rest: list[int] = []
    for rank in range(after[0]):
        batches = make(rank, after)
        batches.load_state_dict(json.loads(json.dumps(first[-1].state_dict())))
        found = batches.verify()
        rest += rest_of_epoch(batches, 1)
    assert Counter(seen) + Counter(set(rest)) == Counter(range(SIZE))
    assert len(rest) - len(set(rest)) == found.twice == -len(set(rest)) % after[0]
    assert (found.seen, found.left, found.lost) == (len(seen), len(set(rest)), 0)


def test_a_state_of_another_sampler_is_refused() -> None:
    batches = RepeatingLoader(loader())
    take(batches, 1)
    alone = RepeatingLoader(loader(local_rank=-1))
    with pytest.raises(LoaderStateError, match=r"the first batch of epoch 0 has other samples"):
        alone.load_state_dict(batches.state_dict())


# Engines


def engine_of(data: Any = None, **config: Any) -> Any:
    """An engine over all ranks, and its loader of ``data``."""
    import deepspeed

    warnings.simplefilter("ignore")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    model = torch.nn.Linear(1, 1)
    given = {"train_micro_batch_size_per_gpu": 3, "steps_per_print": 10**9, **config}
    made = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        training_data=data,
        config=given,
        dist_init_required=False,
    )
    return made[0], made[2]


def with_an_engine(rank: int) -> Any:
    def made(seed: int) -> Any:
        seed_all(seed)
        # pin_memory needs an accelerator
        return engine.deepspeed_io(list(range(SIZE)), pin_memory=False, num_local_io_workers=0)

    engine, training = engine_of(list(range(SIZE)))
    training.num_local_io_workers, training.pin_memory = 0, False
    by_itself = made(0)
    want = by_hand(by_itself, EPOCHS, by_itself.data_sampler.set_epoch)
    require_resumes(made, want, range(2 * len(by_itself) + 1))
    assert take(RepeatingLoader(training), len(want)) == want
    # An iterator as train_batch is given, which only some ranks of a pipeline ask.
    batches = iter(RepeatingLoader(made(0)))
    if rank == 0:
        assert take(batches, 7) == want[:7]
    dist.barrier()
    batches.load_state_dict(batches.state_dict())
    if rank == 0:
        assert take(batches, 2) == want[7:9]
    # Two steps, then another batch size.
    batches = RepeatingLoader(made(0))
    seen = [sample for _, batch in take(batches, 2) for sample in batch]
    other = RepeatingLoader(engine.deepspeed_io(list(range(SIZE)), 2, pin_memory=False, num_local_io_workers=0))
    other.load_state_dict(batches.state_dict())
    assert other.verify(dist.group.WORLD).lost == 0
    return want, seen, rest_of_epoch(other)


def test_the_loaders_of_engines_on_two_ranks() -> None:
    (want, seen, rest), (other_want, other_seen, other_rest) = run_ranks(with_an_engine, 2, env=ENV, timeout=280)
    for epoch in range(EPOCHS):
        samples = [sample for at, batch in want + other_want if at == epoch for sample in batch]
        assert set(samples) == set(range(SIZE))
    assert want[:4] != want[4:8]
    assert Counter(seen + other_seen) + Counter({*rest, *other_rest}) == Counter(range(SIZE))


def curriculum(folder: Path) -> dict[str, Any]:
    difficulty = {
        "difficulty_type": "value",
        "clustering_type": "single_cluster",
        "min_difficulty": 1,
        "max_difficulty": 2,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 1},
    }
    sampling = {
        "enabled": True,
        "num_epochs": 1,
        "num_workers": 0,
        "pin_memory": False,
        "curriculum_learning": {
            "enabled": True,
            "data_cluster_path": str(folder),
            "curriculum_metrics": {"length": difficulty},
        },
    }
    return {"data_efficiency": {"enabled": True, "seed": 7, "data_sampling": sampling}}


def with_a_curriculum(rank: int, folder: Path) -> Any:
    def made(name: str) -> Any:
        engine, _ = engine_of(**curriculum(folder / name))
        return engine.deepspeed_io(list(range(SIZE)), pin_memory=False)

    want = by_hand(made("by hand"), 1)
    given = made("repeating")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoaderWarning)
        batches = RepeatingLoader(given)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, LoaderWarning)] == [
        "DeepSpeedDataLoader: cannot resume exactly, because its curriculum sampler is not told where to begin: "
        "restore it by DeepSpeed's load_checkpoint"
    ]
    assert take(batches, len(want)) == want
    with pytest.raises(OneShotLoaderError, match="none in epoch 1"):  # its num_epochs are over
        next(batches)
    with pytest.raises(TypeError, match="nothing can be proved"):
        batches.verify()
    return want


def test_a_curriculum_goes_on_until_its_epochs_are_over_and_says_that_it_cannot_resume(tmp_path: Path) -> None:
    one: Batches = run_ranks(with_a_curriculum, 1, tmp_path, env=ENV, timeout=280)[0]
    assert len(one) > SIZE // 3


def test_nothing_else_is_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoaderWarning)
        for options in KINDS.values():
            RepeatingLoader(loader(**options()))

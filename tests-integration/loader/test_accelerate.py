"""Every loader that Accelerate prepares: its own order, stopped anywhere, on any number of processes."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_loader import LoaderStateError, LoaderWarning, RepeatingLoader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

pytest.importorskip("accelerate")
pytest.importorskip("torchdata")
sys.path.insert(0, str(Path(__file__).parent))

import accelerate.data_loader
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from ranks import run_ranks
from wrapper_loops import (
    Batches,
    GeneratorStream,
    GlobalSampler,
    HearingStream,
    KeepingStream,
    Stream,
    by_hand,
    may_have_workers,
    plain,
    require_resumes,
    require_shuffled,
    rest_of_epoch,
    seed_all,
    stored,
    take,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital:UserWarning")  # torchdata calls it

SIZE = 23  # no number of processes or batch size below divides it
EPOCHS = 3


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[Accelerator]:
    """Accelerate keeps one state in each process."""
    yield Accelerator(cpu=True)
    Accelerator(cpu=True).free_memory()


class Rows(list[int]):
    """A dataset that is asked for whole batches."""

    def __getitem__(self, rows: Any) -> Any:
        return [10 * row for row in rows]


def loader(
    data: Callable[[], Any] = lambda: list(range(SIZE)),
    *,
    size: int = 3,
    shuffle: bool = True,
    workers: int = 0,
    drop_last: bool = False,
    **options: Any,
) -> Callable[[int], Any]:
    """How to prepare a fresh loader in a process whose global generators are seeded."""

    def make(seed: int) -> Any:
        seed_all(seed)
        made = data()
        is_stream = isinstance(made, Stream)
        given = DataLoader(
            made,
            batch_size=size,
            shuffle=None if is_stream else shuffle,
            num_workers=workers,
            drop_last=drop_last,
        )
        return prepare_data_loader(given, **{"num_processes": 2, "process_index": 0, **options})

    return make


def sampled(sampler: Callable[[], Any], **options: Any) -> Callable[[int], Any]:
    def make(seed: int) -> Any:
        seed_all(seed)
        given = DataLoader(list(range(SIZE)), batch_size=3, sampler=sampler())
        return prepare_data_loader(given, **{"num_processes": 2, "process_index": 0, **options})

    return make


def batched(**options: Any) -> Callable[[int], Any]:
    """A batch sampler in the place of the sampler, for datasets that load whole batches."""

    def make(seed: int) -> Any:
        seed_all(seed)
        data = Rows(range(SIZE))
        given = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 3, False))
        return prepare_data_loader(given, **{"num_processes": 2, "process_index": 0, **options})

    return make


def skipped(make: Callable[[int], Any], count: int) -> Callable[[int], Any]:
    return lambda seed: skip_first_batches(make(seed), count)


# The order of each follows from what it holds, so that a loop by hand over a fresh one has it, too.
SEEDABLE = {"use_seedable_sampler": True}
STATEFUL = {"use_stateful_dataloader": True}
KINDS = {
    "in order": loader(shuffle=False),
    "plain": loader(),
    "other process": loader(process_index=1),
    "four processes": loader(num_processes=4, process_index=3),
    "three processes": loader(num_processes=3, process_index=1),
    "split": loader(size=4, split_batches=True, process_index=1),
    "uneven": loader(even_batches=False, process_index=1),
    "uneven split": loader(size=4, split_batches=True, even_batches=False, process_index=1),
    "drop last": loader(drop_last=True),
    "more than there are": loader(size=20, num_processes=4, process_index=2),
    "seedable": loader(**SEEDABLE, data_seed=1),
    "seedable by the global seed": loader(**SEEDABLE),
    "seedable alone": loader(**SEEDABLE, data_seed=1, num_processes=1),
    "stateful": loader(**STATEFUL),
    "stateful seedable": loader(**STATEFUL, **SEEDABLE, data_seed=1),
    "synchronized": loader(rng_types=["generator"]),
    "on a device": loader(put_on_device=True, device=torch.device("cpu")),
    "batch sampler": batched(),
    "weighted": sampled(lambda: WeightedRandomSampler([1.0, 2.0] * 11, SIZE)),
    "skipping": skipped(loader(), 2),
    "skipping seedable": skipped(loader(**SEEDABLE, data_seed=1), 2),
    "skipping batch sampler": skipped(batched(), 2),
    "stream": loader(lambda: HearingStream(SIZE)),
    "stream alone": loader(lambda: HearingStream(SIZE), num_processes=1),
    "stream split": loader(lambda: HearingStream(SIZE), size=4, split_batches=True, process_index=1),
    "stream drop last": loader(lambda: HearingStream(SIZE), drop_last=True),
    "deaf stream": loader(lambda: Stream(SIZE)),
    "stream with generator": loader(lambda: GeneratorStream(SIZE)),
    "synchronized stream": loader(lambda: GeneratorStream(SIZE), rng_types=["generator"]),
    "skipping stream": skipped(loader(lambda: HearingStream(SIZE)), 2),
    "stream in stateful": loader(lambda: HearingStream(SIZE), **STATEFUL),
    "keeping stream in stateful": loader(lambda: KeepingStream(SIZE), **STATEFUL),
    "keeping stream in stateful alone": loader(lambda: KeepingStream(SIZE), **STATEFUL, num_processes=1),
    "dispatched alone": loader(put_on_device=True, dispatch_batches=True, **SEEDABLE, data_seed=1, num_processes=1),
}
# With workers, and the same without.
WITH_WORKERS = {
    "plain": (loader(workers=2), loader()),
    "seedable by the global seed": (loader(workers=2, **SEEDABLE), loader(**SEEDABLE)),
    "synchronized": (loader(workers=2, rng_types=["generator"]), loader()),
    "stream": (loader(lambda: HearingStream(SIZE), workers=2), None),
    # A loop by hand over this one has another order in the first epoch: Accelerate begins it before it has its sampler.
    "stateful seedable": (
        loader(workers=2, **STATEFUL, **SEEDABLE, data_seed=1),
        loader(**STATEFUL, **SEEDABLE, data_seed=1),
    ),
    "keeping stream in stateful": (loader(lambda: KeepingStream(SIZE), workers=2, **STATEFUL), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_a_loop_by_hand_and_every_stop_resumes_in_it(kind: str) -> None:
    make = KINDS[kind]
    want = by_hand(make(0), EPOCHS)
    assert take(RepeatingLoader(make(0)), len(want)) == want
    per_epoch = len(want) // EPOCHS
    require_resumes(make, want, range(min(2 * per_epoch + 1, len(want) - 1)))
    if kind not in ("in order", "deaf stream"):
        assert [batch for _, batch in want[:per_epoch]] != [batch for _, batch in want[per_epoch : 2 * per_epoch]]


@pytest.mark.parametrize("kind", WITH_WORKERS)
def test_with_workers_too(kind: str) -> None:
    make, alone = WITH_WORKERS[kind]
    want = by_hand((alone or make)(0), EPOCHS)
    per_epoch = len(want) // EPOCHS
    require_resumes(make, want, (1, per_epoch))


def test_no_order_is_lost_to_the_iterator_that_a_stateful_loader_of_accelerate_begins_with() -> None:
    """With workers it draws an order when it is made, which a loop by hand then uses; here the next one is drawn."""
    make = loader(workers=2, **STATEFUL, num_processes=1, rng_types=None)
    batches = RepeatingLoader(make(0))
    want = take(batches, 24)
    require_shuffled(want, range(SIZE))
    require_resumes(make, want, (3, 8))
    batches.close()


# Samplers without a generator draw from torch's global one: there, an order is private to the RepeatingLoader.
@pytest.mark.parametrize(
    "make",
    [
        loader(num_processes=1),
        loader(num_processes=1, **STATEFUL),
        sampled(lambda: GlobalSampler(SIZE), num_processes=1),
    ],
)
def test_an_order_of_the_global_generators_changes_and_resumes(make: Callable[[int], Any]) -> None:
    want = take(RepeatingLoader(make(0)), 24)
    require_shuffled(want, range(SIZE))
    require_resumes(make, want, range(17))


def test_a_state_goes_to_another_process() -> None:
    make = KINDS["seedable by the global seed"]
    want = by_hand(make(0), EPOCHS)
    batches = RepeatingLoader(make(0))
    take(batches, 6)
    assert run_ranks(resumed, 1, stored(batches.state_dict()), len(want) - 6) == [want[6:]]


def resumed(rank: int, state: dict[str, Any], count: int) -> Batches:
    Accelerator(cpu=True)
    batches = RepeatingLoader(KINDS["seedable by the global seed"](99))
    batches.load_state_dict(state)
    return take(batches, count)


def test_warnings_name_only_what_cannot_be_done() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoaderWarning)
        for kind, make in KINDS.items():
            if kind not in ("deaf stream", "in order"):
                RepeatingLoader(make(0))


# Another number of processes, another batch size


def seen_and_rest(
    before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]], steps: int
) -> tuple[list[int], list[int]]:
    """The samples of epoch 1 handed out on all processes before a stop there, and those after it elsewhere."""
    (processes, options), (others, other_options) = before, after
    seen: list[int] = []
    states = []
    for rank in range(processes):
        batches = RepeatingLoader(loader(num_processes=processes, process_index=rank, **options)(0))
        while batches.epoch == 0:
            first = plain(next(batches))
        for step in range(steps):
            seen += first if step == 0 else plain(next(batches))
        states.append(stored(batches.state_dict()))
    rest: list[int] = []
    for rank in range(others):
        batches = RepeatingLoader(loader(num_processes=others, process_index=rank, **other_options)(5))
        batches.load_state_dict(states[rank % processes])
        found = batches.verify()
        assert found.lost == found.dropped
        rest += rest_of_epoch(batches, 1)
    return seen, rest


@pytest.mark.parametrize("options", [{}, SEEDABLE, {**STATEFUL, **SEEDABLE, "data_seed": 4}, {"even_batches": False}])
@pytest.mark.parametrize(("before", "after"), [((2, 3), (4, 1)), ((4, 2), (1, 3)), ((3, 2), (2, 2)), ((2, 2), (2, 5))])
def test_other_processes_and_batch_sizes_go_on_with_what_nobody_saw(
    options: dict[str, Any], before: tuple[int, int], after: tuple[int, int]
) -> None:
    steps = 2
    (processes, size), (others, other_size) = before, after
    seen, rest = seen_and_rest((processes, {"size": size, **options}), (others, {"size": other_size, **options}), steps)
    assert len(seen) == steps * processes * size
    assert set(seen).isdisjoint(rest)
    assert Counter(seen) + Counter(set(rest)) == Counter(range(SIZE))
    evens_out = others > 1 and options.get("even_batches", True)
    repeated = -len(set(rest)) % (others * other_size) if evens_out else 0
    assert len(rest) - len(set(rest)) == repeated


def test_split_batches_of_other_processes_go_on_with_what_nobody_saw() -> None:
    split = {"split_batches": True, "size": 4}
    seen, rest = seen_and_rest((2, split), (4, split), 2)
    assert set(seen).isdisjoint(rest)
    assert Counter(seen) + Counter(set(rest)) == Counter(range(SIZE))


def test_a_batch_sampler_in_the_place_of_a_sampler_is_divided_anew() -> None:
    batches = [RepeatingLoader(batched(process_index=rank)(0)) for rank in range(2)]
    seen = [sample for one in batches for _, batch in take(one, 2) for sample in batch]
    rest: list[int] = []
    for rank in range(3):
        other = RepeatingLoader(batched(num_processes=3, process_index=rank)(5))
        other.load_state_dict(stored(batches[0].state_dict()))
        rest += rest_of_epoch(other)
    assert set(seen).isdisjoint(rest)
    assert {*seen, *rest} == {10 * row for row in range(SIZE)}


def test_a_stream_is_not_divided_anew() -> None:
    batches = RepeatingLoader(loader(lambda: HearingStream(SIZE))(0))
    take(batches, 1)
    other = RepeatingLoader(loader(lambda: HearingStream(SIZE), num_processes=3)(0))
    with pytest.raises(LoaderStateError, match="world_size: 2 in the state, 3 here"):
        other.load_state_dict(batches.state_dict())


def test_ranks_with_other_global_seeds_share_one_order_if_a_seed_is_given() -> None:
    for sampler in (lambda: GlobalSampler(SIZE), lambda: RandomSampler(range(SIZE))):
        out: list[int] = []
        for rank in range(2):
            batches = RepeatingLoader(sampled(sampler, process_index=rank, even_batches=False)(rank), seed=11)
            out += rest_of_epoch(batches)
        assert Counter(out) == Counter(range(SIZE))


def test_a_seed_is_that_of_seedable_samplers_too() -> None:
    out: list[int] = []
    for rank in range(2):
        make = loader(**SEEDABLE, process_index=rank, even_batches=False)
        out += rest_of_epoch(RepeatingLoader(make(rank), seed=11))
    assert Counter(out) == Counter(range(SIZE))


# What Accelerate knows about the loop


def flags(accelerator: Accelerator, batches: Any, prepared: Any, count: int) -> list[Any]:
    """What Accelerate says at every batch."""
    out = []
    for batch in batches:
        state = accelerator.gradient_state
        with accelerator.accumulate():
            synced = accelerator.sync_gradients
        metrics = accelerator.gather_for_metrics(batch).tolist()
        out.append((state.end_of_dataloader, state.remainder, prepared.end_of_dataloader, synced, metrics))
        if len(out) == count:
            return out
    return out


@pytest.mark.parametrize("to_device", [None, "cpu"])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 9])
def test_accelerate_accumulates_and_gathers_as_in_a_loop_by_hand(stop: int, to_device: str | None) -> None:
    def made() -> tuple[Accelerator, Any]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        seed_all(0)
        return accelerator, accelerator.prepare(DataLoader(list(range(SIZE)), batch_size=3))

    accelerator, prepared = made()
    want = flags(accelerator, prepared, prepared, 100) + flags(accelerator, prepared, prepared, 100)
    assert [end for end, *_ in want] == 2 * (7 * [False] + [True])
    accelerator, prepared = made()
    batches = RepeatingLoader(prepared, to_device=to_device)
    got = flags(accelerator, batches, prepared, stop) if stop else []
    state, steps = batches.state_dict(), accelerator.step
    accelerator, prepared = made()
    accelerator.step = steps
    batches = RepeatingLoader(prepared, to_device=to_device)
    batches.load_state_dict(state)
    got += flags(accelerator, batches, prepared, 16 - stop)
    assert got == want


def test_two_loaders_of_one_accelerator(fresh_state: Accelerator) -> None:
    accelerator = fresh_state
    train = accelerator.prepare(DataLoader(list(range(6)), batch_size=2))
    other = accelerator.prepare(DataLoader(list(range(10, 15)), batch_size=2))
    batches, others = RepeatingLoader(train), RepeatingLoader(other)
    next(batches)
    assert not accelerator.gradient_state.end_of_dataloader
    assert [batch.tolist() for batch in other] == [[10, 11], [12, 13], [14]]  # an evaluation by hand
    assert take(others, 3) == [(0, [10, 11]), (0, [12, 13]), (0, [14])]
    assert accelerator.gradient_state.end_of_dataloader
    assert take(batches, 3) == [(0, [2, 3]), (0, [4, 5]), (1, [0, 1])]


def test_accelerators_checkpoints_beside_it(fresh_state: Accelerator, tmp_path: Path) -> None:
    for kind in ("seedable", "stateful seedable", "keeping stream in stateful"):
        make = KINDS[kind]
        want = by_hand(make(0), EPOCHS)
        accelerator = Accelerator(cpu=True)
        accelerator._dataloaders = [make(0)]
        batches = RepeatingLoader(accelerator._dataloaders[0])
        take(batches, 2)
        accelerator.save_state(str(tmp_path / kind))
        assert take(batches, 3) == want[2:5]  # saving changes nothing
        state = batches.state_dict()
        accelerator._dataloaders = [make(1)]
        batches = RepeatingLoader(accelerator._dataloaders[0])
        accelerator.load_state(str(tmp_path / kind))
        batches.load_state_dict(state)
        assert take(batches, len(want) - 5) == want[5:]


# Errors


class Bad(list[int]):
    """A dataset with a sample that cannot be loaded."""

    def __getitem__(self, place: Any) -> Any:
        if place == 7:
            raise OSError("corrupt")
        return super().__getitem__(place)


def test_an_error_takes_no_batch_but_its_own() -> None:
    make = loader(lambda: Bad(range(SIZE)), shuffle=False, num_processes=1)
    batches = RepeatingLoader(make(0), on_error="skip")
    assert take(batches, 9) == [(0, [n, n + 1, n + 2]) for n in (0, 3, 9, 12, 15, 18)] + [
        (0, [21, 22]),
        (1, [0, 1, 2]),
        (1, [3, 4, 5]),
    ]
    batches = RepeatingLoader(make(0))
    assert take(batches, 2) == [(0, [0, 1, 2]), (0, [3, 4, 5])]
    for _ in range(2):
        with pytest.raises(OSError, match="corrupt"):
            next(batches)
    assert take(batches, 1) == [(0, [9, 10, 11])]


class FailsOnce(KeepingStream):
    failed = False

    def __iter__(self) -> Iterator[int]:
        for sample in super().__iter__():
            if sample == 7 and not self.failed:
                self.failed = True
                self.at -= 1
                raise OSError("the network is gone")
            yield sample


def test_a_stream_with_a_state_goes_on_after_an_error() -> None:
    batches = RepeatingLoader(loader(lambda: FailsOnce(SIZE), num_processes=1, **STATEFUL)(0))
    assert take(batches, 2) == [(0, [0, 1, 2]), (0, [3, 4, 5])]
    with pytest.raises(OSError, match="the network is gone"):
        next(batches)
    assert take(batches, 1) == [(0, [6, 7, 8])]


# Ranks


def with_a_generator_each(rank: int, workers: int) -> Any:
    """Accelerate gives all ranks the generator of rank 0, and a state holds that one."""
    may_have_workers()
    accelerator = Accelerator(cpu=True)
    seed_all(rank)  # the generators that Accelerate makes differ

    def prepared() -> Any:
        data = DataLoader(list(range(SIZE)), batch_size=3, shuffle=True, num_workers=workers)
        return accelerator.prepare(data)

    batches = RepeatingLoader(prepared())
    got = take(batches, 6)
    assert batches.verify().lost == 0
    state = batches.state_dict()
    after = take(batches, 2)
    if workers == 0:
        seed_all(10 + rank)
        other = RepeatingLoader(prepared())
        states: list[Any] = [None, None]
        torch.distributed.all_gather_object(states, state)
        assert states[0]["generators"] == states[1]["generators"]
        other.load_state_dict(states[1])  # on both
        assert take(other, 6) == after + take(batches, 4)
    return got + after


@pytest.mark.parametrize("workers", [0, 1])
def test_all_ranks_have_the_order_of_rank_0(workers: int) -> None:
    one, other = run_ranks(with_a_generator_each, 2, workers)
    for epoch in range(2):
        samples = [sample for at, batch in one + other if at == epoch for sample in batch]
        assert len(samples) == 24
        assert set(samples) == set(range(SIZE))


def flags_of_ranks(rank: int) -> None:
    want = rank_flags(rank, wrapped=False)
    assert rank_flags(rank, wrapped=True) == want


def rank_flags(rank: int, *, wrapped: bool) -> list[Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    accelerator.step = 0
    seed_all(0)
    prepared = accelerator.prepare(DataLoader(list(range(SIZE)), batch_size=3, shuffle=True))
    if wrapped:
        return flags(accelerator, RepeatingLoader(prepared), prepared, 8)
    return flags(accelerator, prepared, prepared, 100) + flags(accelerator, prepared, prepared, 100)


def test_ranks_accumulate_and_gather_as_in_a_loop_by_hand() -> None:
    run_ranks(flags_of_ranks, 2)


DISPATCHED: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (lambda: list(range(SIZE)), {"shuffle": True}, {}),
    "drop last": (lambda: list(range(SIZE)), {"shuffle": True, "drop_last": True}, {}),
    "seedable": (lambda: list(range(SIZE)), {"shuffle": True}, SEEDABLE),
    "split": (lambda: list(range(SIZE)), {"shuffle": True, "batch_size": 4}, {"split_batches": True}),
    "stateful": (lambda: list(range(SIZE)), {"shuffle": True}, STATEFUL),
    "stream": (lambda: HearingStream(SIZE), {}, {}),
    "stream split": (lambda: HearingStream(SIZE), {"batch_size": 4}, {"split_batches": True}),
    "stream drop last": (lambda: HearingStream(SIZE), {"drop_last": True}, {}),
    "stream in stateful": (lambda: HearingStream(SIZE), {}, STATEFUL),
    "stream with generator": (lambda: GeneratorStream(SIZE), {}, {}),
}


def dispatch(kind: str, seed: int, **more: Any) -> Any:
    """A loader that rank 0 loads for all, with a generator that the user made."""
    seed_all(seed)
    data, given, options = DISPATCHED[kind]
    arguments = {"batch_size": 3, **given, **more}
    if arguments.pop("shuffle", False):
        arguments["sampler"] = RandomSampler(range(SIZE), generator=torch.Generator().manual_seed(7))
    options = {"data_seed": 1, "put_on_device": True, "dispatch_batches": True, **options}
    return prepare_data_loader(DataLoader(data(), **arguments), **options)


def dispatched(rank: int) -> Any:
    Accelerator(cpu=True)
    out = {}
    for kind in DISPATCHED:
        want = out[kind] = by_hand(dispatch(kind, 0), EPOCHS)
        assert take(RepeatingLoader(dispatch(kind, 0)), len(want)) == want, kind
        per_epoch = len(want) // EPOCHS
        stops = (1, per_epoch - 1, per_epoch, per_epoch + 2)
        require_resumes(lambda seed, kind=kind: dispatch(kind, seed), want, stops)
    return out


def test_rank_0_loads_for_all_as_in_a_loop_by_hand_and_every_stop_resumes_in_it() -> None:
    one, other = run_ranks(dispatched, 2)
    for kind in DISPATCHED:
        for epoch in range(EPOCHS):
            samples = {sample % 100 for at, batch in one[kind] + other[kind] if at == epoch for sample in batch}
            assert samples <= set(range(SIZE))
            assert len(samples) == (18 if "drop last" in kind else SIZE)


def dispatched_with_workers(rank: int) -> None:
    may_have_workers()
    Accelerator(cpu=True)
    want = by_hand(dispatch("plain", 0), EPOCHS)
    batches = RepeatingLoader(dispatch("plain", 0, num_workers=1))
    assert take(batches, 5) == want[:5]
    other = RepeatingLoader(dispatch("plain", 1, num_workers=1))
    other.load_state_dict(batches.state_dict())
    assert take(other, 2) == want[5:7]


def test_rank_0_loads_for_all_with_workers() -> None:
    run_ranks(dispatched_with_workers, 2)


def dispatched_elsewhere(rank: int) -> Any:
    """The rest of an epoch, with another batch size, after a state that rank 1 saved."""
    Accelerator(cpu=True)
    batches = RepeatingLoader(dispatch("plain", 0))
    take(batches, 4)  # an epoch
    seen = take(batches, 2)
    states: list[Any] = [None, None]
    torch.distributed.all_gather_object(states, batches.state_dict())
    other = RepeatingLoader(dispatch("plain", 1, batch_size=2))
    other.load_state_dict(states[1])
    found = other.verify(torch.distributed.group.WORLD)
    assert (found.seen, found.left, found.lost) == (12, 11, 0)
    rest = take(other, 1)
    again = RepeatingLoader(dispatch("plain", 2, batch_size=2))
    again.load_state_dict(other.state_dict())
    left = rest_of_epoch(again, 1)
    return [sample for _, batch in seen for sample in batch], [*rest[0][1], *left], found.twice


def test_rank_0_goes_on_with_what_nobody_saw_in_batches_of_another_size() -> None:
    (seen, rest, twice), (other_seen, other_rest, _) = run_ranks(dispatched_elsewhere, 2)
    seen, rest = seen + other_seen, rest + other_rest
    assert Counter(seen) + Counter(set(rest)) == Counter(range(SIZE))
    assert len(rest) - len(set(rest)) == twice


class Corrupt(torch.utils.data.Dataset[Any]):
    """Sample 2 of 12 cannot be loaded."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise OSError("corrupt")
        return index


def dispatched_with_an_error(rank: int) -> list[str]:
    """Rank 0 alone, as it loads for both; the other one would wait for it."""
    Accelerator(cpu=True)

    def make() -> Any:
        return prepare_data_loader(DataLoader(Corrupt(), 2), dispatch_batches=True, put_on_device=True)

    with pytest.raises(ValueError, match=r"on_error must be 'raise' for a DataLoaderDispatcher"):
        RepeatingLoader(make(), on_error="skip")
    if rank == 1:
        return []
    batches, told = RepeatingLoader(make()), []
    for _ in range(3):
        with pytest.raises((OSError, RuntimeError)) as caught:
            next(batches)
        told.append(str(caught.value))
    return told


def test_an_error_of_rank_0_that_loads_for_all_is_final() -> None:
    first, *more = run_ranks(dispatched_with_an_error, 2)[0]
    assert "corrupt" in first
    assert all("the ranks are out of step" in text for text in more)


# Old releases


def test_a_loader_of_an_old_accelerate_which_wraps_nothing_is_iterated_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class DataLoaderShard(DataLoader[Any]):
        """It sets the epoch itself, and is one batch ahead."""

        iteration = 0

        def __iter__(self) -> Any:
            self.set_epoch(self.iteration)
            ahead: list[Any] = []
            for batch in super().__iter__():
                yield from ahead
                ahead = [batch]
            yield from ahead
            self.iteration += 1

        def set_epoch(self, epoch: int) -> None:
            self.iteration = epoch

    monkeypatch.setattr(accelerate.data_loader, "DataLoaderShard", DataLoaderShard)

    def make(seed: int) -> Any:
        generator = torch.Generator().manual_seed(7)
        return DataLoaderShard(list(range(SIZE)), batch_size=3, sampler=RandomSampler(range(SIZE), generator=generator))

    want = by_hand(make(0), EPOCHS)
    assert take(RepeatingLoader(make(0)), len(want)) == want
    require_resumes(make, want, range(17))
    batches = RepeatingLoader(make(0))
    take(batches, 1)
    other = RepeatingLoader(DataLoaderShard(list(range(SIZE)), batch_size=4))
    with pytest.raises(LoaderStateError, match="batch_size: 3 in the state, 4 here"):
        other.load_state_dict(batches.state_dict())

"""Ranks whose epochs differ in length, or that go through one epoch together."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist
from ds_loader import LoaderStateError, RepeatingLoader, UnevenRanksError
from ranks import run_ranks
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

LENGTHS = (3, 5)  # batches of an epoch on each of two ranks


class Broken(Dataset):
    def __init__(self, length, broken):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("a sample that cannot be loaded")
        return index


def batches(rank, on_uneven, kind="loader", **options):
    count = LENGTHS[rank]
    source = DataLoader(range(count), batch_size=1) if kind == "loader" else list(range(count))
    return RepeatingLoader(source, on_uneven=on_uneven, **options)


def take(loader, count):
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in itertools.islice(loader, count)]


def error_of(call):
    try:
        call()
    except (UnevenRanksError, LoaderStateError) as error:
        return type(error).__name__, str(error)
    return None


def saved(loader):
    return json.loads(json.dumps(loader.state_dict()))


# cycle, stop, raise


def cycle(rank):
    loader = batches(rank, "cycle", "list")
    return take(loader, 7), loader.epoch


def test_cycle_lets_each_rank_go_on_alone():
    assert run_ranks(cycle) == [([0, 1, 2, 0, 1, 2, 0], 2), ([0, 1, 2, 3, 4, 0, 1], 1)]


def stop(rank, kind, limit):
    loader = batches(rank, "stop", kind, **limit)
    seen = [sum(batch) if isinstance(batch, list) else batch for batch in take(loader, 7)]
    return seen, loader.epoch, loader.batch, loader.step


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_stop_ends_an_epoch_with_the_shortest(kind):
    assert run_ranks(stop, 2, kind, {}) == [([0, 1, 2, 0, 1, 2, 0], 2, 1, 7)] * 2


def test_stop_keeps_to_limits():
    assert run_ranks(stop, 2, "list", {"max_steps": 5}) == [([0, 1, 2, 0, 1], 1, 2, 5)] * 2
    assert run_ranks(stop, 2, "list", {"max_epochs": 2}) == [([0, 1, 2, 0, 1, 2], 2, 0, 6)] * 2


def stop_and_resume(rank):
    expected = take(batches(rank, "stop", "list"), 12)
    for count in range(8):
        first = batches(rank, "stop", "list")
        take(first, count)
        second = batches(rank, "stop", "list")
        second.load_state_dict(saved(first))
        assert take(second, 4) == expected[count : count + 4], count
        third = batches(rank, "stop", "list")
        third.skip(count)
        assert take(third, 4) == expected[count : count + 4], count
    return expected


def test_stop_resumes_and_skips_at_every_batch():
    assert run_ranks(stop_and_resume) == [[0, 1, 2] * 4] * 2


def stop_over_errors(rank):
    source = DataLoader(Broken(LENGTHS[rank], 1 if rank == 0 else None), batch_size=1)
    loader = RepeatingLoader(source, on_uneven="stop", on_error="skip")
    seen = []
    while loader.epoch < 2:
        seen.append((loader.epoch, take(loader, 1)))
    return seen[:-1], loader.state_dict()["left_out"]


def test_a_batch_that_one_rank_leaves_out_does_not_part_the_ranks():
    one, other = run_ranks(stop_over_errors)
    assert [batch for _, batch in one[0]][:3] == [[[0]], [[2]], [[0]]]
    assert [batch for _, batch in other[0]][:4] == [[[0]], [[1]], [[2]], [[0]]]


class Once(Broken):
    """Fails once."""

    def __getitem__(self, index):
        if index == self.broken:
            self.broken = None
            raise OSError("a sample that cannot be loaded yet")
        return index


def begun_again_alone(rank, how):
    on_error = "raise" if how != "retry" else lambda *_: "retry"
    data = range(LENGTHS[rank]) if how == "close" else Once(LENGTHS[rank], 1 if rank == 0 else None)
    loader = RepeatingLoader(DataLoader(data, batch_size=1), on_uneven="stop", on_error=on_error)
    seen = []
    while len(seen) < 7:
        try:
            seen += take(loader, 1)
        except OSError:
            assert how == "raise"
        if how == "close" and rank == 0:
            loader.close()
    return seen


@pytest.mark.parametrize("how", ["raise", "retry", "close"])
def test_a_rank_that_begins_an_epoch_again_asks_nobody(how):
    assert run_ranks(begun_again_alone, 2, how, timeout=20) == [[[0], [1], [2], [0], [1], [2], [0]]] * 2


def refuse(rank):
    loader = batches(rank, "raise")
    return [error_of(lambda: next(loader)) for _ in range(2)]


def test_raise_is_the_same_error_on_all_ranks():
    answers = run_ranks(refuse)
    assert answers[0] == answers[1]
    for kind, message in answers[0]:
        assert kind == "UnevenRanksError"
        assert "the ranks have epochs of different length in batches (rank 0: 3, rank 1: 5)" in message


def even(rank):
    sampler = DistributedSampler(range(10), dist.get_world_size(), rank, seed=3)
    loader = RepeatingLoader(DataLoader(range(10), batch_size=2, sampler=sampler), on_uneven="raise")
    return [sample for batch in take(loader, 3) for sample in batch], take(loader, 4) != []


def test_raise_says_nothing_where_ranks_are_even():
    (one, _), (other, _) = run_ranks(even)
    assert sorted(one + other) == list(range(10))


def apart(rank, on_uneven):
    loader = batches(rank, on_uneven, "list")
    state = {**saved(loader), "epoch": rank, "batch": 1, "step": 1 + 3 * rank}
    loader.load_state_dict(state)
    return [error_of(lambda: next(loader)) for _ in range(2)]


@pytest.mark.parametrize("on_uneven", ["stop", "raise"])
def test_ranks_at_different_places(on_uneven):
    answers = run_ranks(apart, 2, on_uneven)
    assert answers[0] == answers[1]
    for kind, message in answers[0]:
        assert kind == "UnevenRanksError"
        assert "(rank 0: epoch 0, batch 1, rank 1: epoch 1, batch 1)" in message


def elastic(rank):
    def make(world_size, rank, **options):
        sampler = DistributedSampler(range(17), world_size, rank, seed=3)
        return RepeatingLoader(DataLoader(range(17), batch_size=1, sampler=sampler), **options)

    before = [make(3, other) for other in range(3)]
    out = [sample for loader in before for batch in take(loader, 2) for sample in batch]
    loader = make(2, rank, on_uneven="stop")
    loader.load_state_dict(saved(before[rank]))
    mine = []
    while True:
        (batch,) = take(loader, 1)
        if loader.epoch == 1:
            break
        mine += batch
    (second,) = take(loader, 1)
    return out, mine, batch + second


def test_stop_in_an_epoch_that_was_divided_anew():
    (out, one, first), (_, other, second) = run_ranks(elastic)
    assert len(one) == len(other) == 6
    assert set(out + one + other) == set(range(17))
    assert len(out + one + other) == 18  # one sample evens out the two ranks
    by_hand = DistributedSampler(range(17), 1, 0, seed=3)
    by_hand.set_epoch(1)
    assert [first[0], second[0], first[1], second[1]] == list(by_hand)[:4]


def of_a_group(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    count = (3, 5, 4)[rank]
    loader = RepeatingLoader(list(range(count)), on_uneven="stop", group=groups[rank == 2])
    return take(loader, 5)


def test_only_the_ranks_of_the_group_agree():
    assert run_ranks(of_a_group, 3) == [[0, 1, 2, 0, 1]] * 2 + [[0, 1, 2, 3, 0]]


def collectives(rank):
    calls = []
    gather = dist.all_gather

    def counted(*args, **kwargs):
        calls.append(1)
        return gather(*args, **kwargs)

    dist.all_gather = counted
    loader = RepeatingLoader(list(range(50 + rank)), on_uneven="stop")
    take(loader, 101)
    return len(calls)


def test_there_is_one_collective_an_epoch():
    assert run_ranks(collectives) == [3, 3]


# verify over a group


def verified(rank, change):
    options = {"seed": 3, "length": 20, "batch_size": 2, "steps": 2, "share": rank}
    options.update(change if rank == 1 else {})
    data = range(options["length"])
    sampler = DistributedSampler(data, 2, options["share"], seed=options["seed"])
    loader = RepeatingLoader(DataLoader(data, batch_size=options["batch_size"], sampler=sampler))
    take(loader, options["steps"])
    error = error_of(lambda: loader.verify(dist.group.WORLD))
    return error or loader.verify(dist.group.WORLD).seen


def test_verify_of_ranks_that_are_alike():
    assert run_ranks(verified, 2, {}) == [8, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "rank 1 has another order of samples than rank 0"),
        ({"length": 21}, "length: 20 on rank 0, 21 on rank 1"),
        ({"batch_size": 3}, "batch_size: 2 on rank 0, 3 on rank 1"),
        ({"steps": 3}, "samples: 8 on rank 0, 12 on rank 1"),
        ({"share": 0}, r"the shares [0, 0] of an epoch are taken, of 2"),
    ],
)
def test_verify_of_ranks_that_differ(change, message):
    answers = run_ranks(verified, 2, change)
    assert answers[0] == answers[1]
    assert answers[0][0] == "LoaderStateError"
    assert message in answers[0][1]


def seeds(rank):
    torch.manual_seed(rank)
    loader = RepeatingLoader(DataLoader(range(20), batch_size=2, shuffle=True))
    take(loader, 1)
    return error_of(lambda: loader.verify(dist.group.WORLD))


def test_verify_of_ranks_with_other_global_seeds():
    answers = run_ranks(seeds)
    assert answers[0] == answers[1]
    assert "rank 1 has another order of samples than rank 0" in answers[0][1]


# What it needs


@pytest.mark.parametrize("on_uneven", ["stop", "raise"])
def test_it_needs_a_process_group(on_uneven):
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=f"on_uneven='{on_uneven}' needs a process group: call torch.distributed"):
        RepeatingLoader([1, 2], on_uneven=on_uneven)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class NoLength:
    def __iter__(self):
        return iter(range(3))


def without_length(rank, on_uneven):
    with pytest.raises(ValueError, match="needs a loader with a length") as told:
        RepeatingLoader(DataLoader(Stream()), on_uneven=on_uneven)
    with pytest.raises(ValueError, match="which NoLength has not"):
        RepeatingLoader(NoLength(), on_uneven=on_uneven)
    return str(told.value)


def test_it_needs_a_length():
    for on_uneven in ("stop", "raise"):
        (message,) = run_ranks(without_length, 1, on_uneven)
        assert message == f"on_uneven='{on_uneven}' needs a loader with a length, which DataLoader has not"

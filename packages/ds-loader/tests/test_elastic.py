"""Go on with another number of ranks or another batch size: no sample is lost, none comes twice."""

import dataclasses
import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from ds_loader import Coverage, LoaderStateError, RepeatingLoader
from ds_loader._random import mixed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def samples_of(batches):
    return [sample for batch in batches for sample in (batch if isinstance(batch, list) else [batch])]


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def saved(loader):
    return json.loads(json.dumps(loader.state_dict()))


# Any number of ranks


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same while ranks come and go."""

    length: int
    drop_last: bool  # of the DataLoader
    drop_tail: bool  # of the sampler
    shuffle: bool = True
    seed: int = 3

    def dataloader(self, world_size, rank, batch_size):
        sampler = DistributedSampler(
            range(self.length), world_size, rank, shuffle=self.shuffle, seed=self.seed, drop_last=self.drop_tail
        )
        drop_last = self.drop_last and batch_size is not None
        return DataLoader(range(self.length), batch_size=batch_size, sampler=sampler, drop_last=drop_last)

    def ranks(self, world_size, batch_size, state=None):
        loaders = [RepeatingLoader(self.dataloader(world_size, rank, batch_size)) for rank in range(world_size)]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        return loaders

    def fits(self, world_size, batch_size):
        """Whether an epoch has a batch for every rank."""
        least = world_size if self.drop_tail else 1
        if self.drop_last:
            least = max(least, world_size * (batch_size or 1))
        return self.length >= least

    def order(self, epoch):
        """The oracle: the order that the sampler has on one rank."""
        sampler = DistributedSampler(range(self.length), 1, 0, shuffle=self.shuffle, seed=self.seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    def by_hand(self, world_size, batch_size, epoch):
        """The oracle: an epoch's batches of every rank."""
        loaders = [self.dataloader(world_size, rank, batch_size) for rank in range(world_size)]
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        return [[as_list(batch) for batch in loader] for loader in loaders]

    def rest_by_hand(self, rest, world_size, batch_size):
        """The oracle: the samples that ranks take, at each step, of what is left of an epoch."""
        even = len(rest) // world_size * world_size
        rest = (
            rest[:even] if self.drop_tail else list(itertools.islice(itertools.cycle(rest), even_up(rest, world_size)))
        )
        step = world_size * (batch_size or 1)
        steps = [rest[start : start + step] for start in range(0, len(rest), step)]
        return [samples for samples in steps if len(samples) == step or not self.drop_last or batch_size is None]


def even_up(rest, world_size):
    return math.ceil(len(rest) / world_size) * world_size


def of_steps(ranks, count):
    """So many steps: the samples of all ranks at each."""
    streams = [take(loader, count) for loader in ranks]
    return [samples_of(step) for step in zip(*streams, strict=True)]


def combinations(count, batch_sizes):
    """Runs of three lives, each with a number of ranks, a batch size and a number of steps."""
    dice = random.Random(0)
    while count:
        run = Run(dice.randint(1, 70), dice.random() < 0.4, dice.random() < 0.4, dice.random() < 0.8)
        lives = [(dice.randint(1, 8), dice.choice(batch_sizes), dice.random()) for _ in range(3)]
        if all(run.fits(world_size, batch_size) for world_size, batch_size, _ in lives):
            count -= 1
            yield run, lives, dice


def steps_of_epoch(run, world_size, batch_size):
    return len(run.rest_by_hand(list(range(run.length)), world_size, batch_size))


def check_lives(run, lives, dice):
    """Go through the lives, and then to the end of an epoch and through a whole one."""
    state, epoch, out, rest, step, ended_by = None, 0, Counter(), run.order(0), 0, 1
    before = None
    for world_size, batch_size, part in lives:
        ranks = run.ranks(world_size, batch_size, state)
        if (world_size, batch_size) != before:
            plan = run.rest_by_hand(rest, world_size, batch_size)
        before = world_size, batch_size
        for _ in range(round(part * 1.5 * steps_of_epoch(run, world_size, batch_size))):
            if not plan:  # the next step begins an epoch
                epoch, out, rest = epoch + 1, Counter(), run.order(epoch + 1)
                plan = run.rest_by_hand(rest, world_size, batch_size)
            (samples,) = of_steps(ranks, 1)
            expected = plan.pop(0)
            assert Counter(samples) == Counter(expected)
            out.update(samples)
            rest = rest[len(samples) :]
            step += 1
            ended_by = world_size
        assert {loader.epoch for loader in ranks} == {epoch}
        assert {loader.step for loader in ranks} == {step}
        left = Counter(samples_of(plan))
        for loader in ranks:
            check_verify(run, loader.verify(), epoch, out, left)
        state = saved(dice.choice(ranks))
    if plan:
        ended_by = world_size
    assert [Counter(samples) for samples in of_steps(ranks, len(plan))] == [Counter(samples) for samples in plan]
    out.update(left)
    repeated, lost = out - Counter(run.order(epoch)), Counter(run.order(epoch)) - out
    assert sum(repeated.values()) < ended_by
    may_drop = world_size * (batch_size or 1) if run.drop_last else world_size if run.drop_tail else 1
    assert sum(lost.values()) < may_drop
    assert [take(loader, len(loader)) for loader in ranks] == run.by_hand(world_size, batch_size, epoch + 1)
    return sum(lost.values()), sum(repeated.values())


def check_verify(run, found, epoch, out, left):
    """Against the samples that were really collected, and those that will be."""
    everything = Counter(run.order(epoch))
    lost = sum((everything - out - left).values())
    assert found == Coverage(
        epoch=epoch,
        length=run.length,
        seen=len(out),
        left=len(left.keys() - out.keys()),
        twice=sum((out + left - everything).values()),
        lost=lost,
        dropped=lost,
    )


def test_three_lives_on_any_ranks_and_batch_sizes():
    results = [check_lives(*combination) for combination in combinations(300, [1, 2, 3, 4, 5, 8])]
    assert any(lost for lost, _ in results)  # the cases that are allowed do occur
    assert any(repeated for _, repeated in results)


def test_three_lives_without_batches():
    for combination in combinations(30, [None]):
        check_lives(*combination)


def test_every_stop_of_an_epoch():
    for drop_last, drop_tail in itertools.product([False, True], repeat=2):
        run = Run(29, drop_last, drop_tail)
        for stop in range(steps_of_epoch(run, 4, 2) + 1):
            for world_size, batch_size in ((5, 2), (4, 3), (8, 1)):
                ranks = run.ranks(4, 2)
                out = Counter(samples_of(of_steps(ranks, stop)))
                others = run.ranks(world_size, batch_size, saved(ranks[stop % 4]))
                left = run.rest_by_hand(run.order(0)[len(out) :], world_size, batch_size)
                found = of_steps(others, len(left))
                assert [Counter(step) for step in found] == [Counter(step) for step in left]
                everything = Counter(run.order(0))
                out.update(samples_of(found))
                assert drop_last or drop_tail or not everything - out
                assert sum((out - everything).values()) < world_size
                after = [take(loader, len(loader)) for loader in others]
                assert after == run.by_hand(world_size, batch_size, 1)


def test_a_state_may_come_back_to_the_ranks_that_it_was_saved_on():
    run = Run(40, False, False)
    ranks = run.ranks(4, 2)
    first = of_steps(ranks, 2)
    others = run.ranks(2, 3, saved(ranks[1]))  # and no step there
    again = run.ranks(4, 2, saved(others[0]))
    rest = of_steps(again, 3)
    assert [samples_of(step) for step in zip(*run.by_hand(4, 2, 0), strict=True)] == first + rest


def test_what_the_first_epoch_left_is_the_same_to_all_ranks_whichever_state_they_load():
    run = Run(37, False, False)
    ranks = run.ranks(3, 2)
    of_steps(ranks, 4)
    streams = []
    for loader in ranks:
        other = RepeatingLoader(run.dataloader(2, 1, 3))
        other.load_state_dict(saved(loader))
        streams.append(take(other, 5))
    assert streams[0] == streams[1] == streams[2]


def test_it_counts_on_in_the_epoch_that_was_divided_anew():
    run = Run(24, False, False)
    ranks = run.ranks(2, 2)
    of_steps(ranks, 4)
    (loader, _) = run.ranks(2, 1, saved(ranks[0]))
    assert (loader.epoch, loader.batch, loader.step, len(loader)) == (0, 0, 4, 12)
    take(loader, 3)
    assert (loader.epoch, loader.batch, loader.step) == (0, 3, 7)
    take(loader, 2)
    assert (loader.epoch, loader.batch, loader.step) == (1, 1, 9)


def test_an_epoch_that_has_nothing_left_ends():
    run = Run(24, False, False)
    ranks = run.ranks(2, 2)
    of_steps(ranks, 6)
    others = run.ranks(3, 2, saved(ranks[0]))
    assert [take(loader, len(loader)) for loader in others] == run.by_hand(3, 2, 1)


def test_max_epochs_holds_in_an_epoch_that_was_divided_anew():
    run = Run(24, False, False)
    ranks = run.ranks(2, 2)
    of_steps(ranks, 4)
    loader = RepeatingLoader(run.dataloader(4, 0, 1), max_epochs=1)
    loader.load_state_dict(saved(ranks[0]))
    assert len(list(loader)) == 2
    assert list(loader) == []


def test_skip_in_an_epoch_that_was_divided_anew():
    run = Run(30, False, False)
    ranks = run.ranks(2, 2)
    of_steps(ranks, 4)
    state = saved(ranks[0])
    for count in range(12):
        (by_hand, _, _), (loader, _, _) = run.ranks(3, 1, state), run.ranks(3, 1, state)
        take(by_hand, count)
        loader.skip(count)
        assert (loader.epoch, loader.batch, loader.step) == (by_hand.epoch, by_hand.batch, by_hand.step)
        assert take(loader, 4) == take(by_hand, 4)


def test_workers_load_what_is_left():
    run = Run(20, False, False)
    ranks = run.ranks(2, 2)
    out = samples_of(of_steps(ranks, 3))
    sampler = DistributedSampler(range(20), 1, 0, seed=3)
    loader = RepeatingLoader(DataLoader(range(20), batch_size=3, sampler=sampler, num_workers=2))
    loader.load_state_dict(saved(ranks[0]))
    assert sorted(out + samples_of(take(loader, 3))) == list(range(20))
    assert [take(loader, 7)] == run.by_hand(1, 3, 1)
    loader.close()


# Any batch size, on one rank

SIZE = 23


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def own(kind, generator):
    return {
        "random": lambda: RandomSampler(range(SIZE), generator=generator),
        "oversampled": lambda: RandomSampler(range(SIZE), num_samples=2 * SIZE + 3, generator=generator),
        "replacement": lambda: RandomSampler(range(SIZE), True, 31, generator=generator),
        "subset": lambda: SubsetRandomSampler(range(4, SIZE), generator=generator),
        "weighted": lambda: WeightedRandomSampler([1.0, 2.0] * 9, 20, generator=generator),
        "sequential": lambda: SequentialSampler(range(SIZE)),
    }[kind]()


KINDS = ["random", "oversampled", "replacement", "subset", "weighted", "sequential"]


def check_batch_sizes(make, orders):
    """Three lives with batch sizes; ``orders`` are those of the epochs, by hand."""
    dice = random.Random(0)
    for _ in range(15):
        state, seen, steps = None, [], 0
        for _ in range(3):
            loader = make(dice.choice([1, 2, 4, 7, None]))
            if state is not None:
                loader.load_state_dict(state)
            count = dice.randint(0, 9)
            seen += samples_of(take(loader, count))
            steps += count
            assert loader.step == steps
            state = saved(loader)
            found = loader.verify()
            assert (found.twice, found.lost, found.seen + found.left) == (0, 0, len(orders[loader.epoch]))
        while len(seen) < 3 * len(orders[0]):
            seen += samples_of(take(loader, 1))
        expected = samples_of(orders)
        assert seen == expected[: len(seen)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_batch_size_with_own_generator(kind):
    sampler = own(kind, seeded())
    orders = [list(sampler) for _ in range(7)]
    check_batch_sizes(
        lambda batch_size: RepeatingLoader(DataLoader(range(SIZE), batch_size=batch_size, sampler=own(kind, seeded()))),
        orders,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_batch_size_without_a_generator(kind):
    def make(batch_size):
        return RepeatingLoader(DataLoader(range(SIZE), batch_size=batch_size, sampler=own(kind, None)))

    torch.manual_seed(0)
    sampler, seed = own(kind, None), make(1).seed
    orders = [list(sampler) for epoch in range(7) if torch.manual_seed(mixed(seed, epoch, -1))]
    torch.manual_seed(0)
    check_batch_sizes(make, orders)


@pytest.mark.parametrize("kind", ["random", "weighted"])
def test_another_batch_size_with_a_seed(kind):
    def make(batch_size):
        loader = DataLoader(range(SIZE), batch_size=batch_size, sampler=own(kind, seeded()))
        return RepeatingLoader(loader, seed=11)

    generator = torch.Generator()
    sampler = own(kind, generator)
    orders = [list(sampler) for epoch in range(7) if generator.manual_seed(mixed(11, epoch, 0))]
    check_batch_sizes(make, orders)


def test_another_batch_size_with_shuffle_and_a_generator_that_the_loader_shares():
    def make(batch_size):
        return RepeatingLoader(DataLoader(range(SIZE), batch_size=batch_size, shuffle=True, generator=seeded()))

    sampler = own("random", seeded())
    check_batch_sizes(make, [list(sampler) for _ in range(7)])


def test_batches_that_are_too_small_are_left_out():
    loader = RepeatingLoader(DataLoader(range(SIZE), batch_size=2, shuffle=True, drop_last=True))
    out = samples_of(take(loader, 3))
    other = RepeatingLoader(DataLoader(range(SIZE), batch_size=5, shuffle=True, drop_last=True))
    other.load_state_dict(saved(loader))
    found = other.verify()
    assert (found.seen, found.left, found.twice, found.lost, found.dropped) == (6, 15, 0, 2, 2)
    out += samples_of(take(other, 3))
    assert len(set(out)) == len(out) == 21
    take(other, 1)
    assert (other.epoch, other.batch) == (1, 1)


# What a state does not fit


class ByEpoch:
    """A batch sampler whose order nobody knows."""

    def __init__(self, batches, num_replicas=1):
        self.batches = batches
        self.num_replicas = num_replicas

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([[batch] for batch in range(self.batches)])

    def __len__(self):
        return self.batches


class Stream(IterableDataset):
    def __init__(self, num_replicas=1):
        self.num_replicas = num_replicas

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(12))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            lambda: DataLoader(range(9), batch_sampler=ByEpoch(8, 2)),
            lambda: DataLoader(range(9), batch_sampler=ByEpoch(4, 4)),
            r"world_size: 2 in the state, 4 here; length: 8 in the state, 4 here\. The order of the loader that was",
        ),
        (
            lambda: DataLoader(range(9), batch_size=3),
            lambda: DataLoader(range(9), batch_sampler=ByEpoch(4)),
            r"batch_size: 3 in the state, None here; length: 9 in the state, 4 here\. The order of DataLoader",
        ),
        (
            lambda: DataLoader(Stream(2), batch_size=3),
            lambda: DataLoader(Stream(3), batch_size=3),
            "world_size: 2 in the state, 3 here",
        ),
        (
            lambda: DataLoader(Stream(), batch_size=3),
            lambda: DataLoader(Stream(), batch_size=4),
            "batch_size: 3 in the state, 4 here",
        ),
        (lambda: [1, 2, 3], lambda: [1, 2], "length: 3 in the state, 2 here"),
    ],
    ids=["batch sampler", "to batch sampler", "ranks of a stream", "batch size of a stream", "list"],
)
def test_an_order_that_is_not_known_cannot_be_divided_anew(before, after, message):
    first = RepeatingLoader(before())
    take(first, 2)
    loader = RepeatingLoader(after())
    expected = take(RepeatingLoader(after()), 2)
    with pytest.raises(LoaderStateError, match=message):
        loader.load_state_dict(saved(first))
    assert take(loader, 2) == expected


def test_a_list_is_not_divided_among_ranks():
    loader = RepeatingLoader([1, 2, 3])
    next(loader)
    with pytest.raises(LoaderStateError, match=r"world_size: 2 in the state, 1 here\. The order of"):
        loader.load_state_dict({**saved(loader), "world_size": 2, "segments": [[2, None, 0]]})
    with pytest.raises(TypeError, match="the order of list over all ranks is not known"):
        loader.verify()


@pytest.mark.parametrize("world_size", [2, 3])
def test_another_length_of_the_dataset_is_refused(world_size):
    first = Run(20, False, False).ranks(2, 2)[0]
    take(first, 2)
    (loader, *_) = Run(21, False, False).ranks(world_size, 2)
    with pytest.raises(LoaderStateError, match="length: 20 in the state, 21 here"):
        loader.load_state_dict(saved(first))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_another_seed_is_refused(batch_size):
    first = RepeatingLoader(DataLoader(range(20), batch_size=2, shuffle=True), seed=1)
    take(first, 2)
    loader = RepeatingLoader(DataLoader(range(20), batch_size=batch_size, shuffle=True), seed=2)
    with pytest.raises(LoaderStateError, match="seed: 1 in the state, 2 here"):
        loader.load_state_dict(saved(first))


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 2), (2, 3), (3, 2), (1, 1)])
@pytest.mark.parametrize("lives", [1, 2])
def test_another_seed_of_the_sampler_is_found_out(world_size, batch_size, lives):
    run = Run(40, False, False)
    first = run.ranks(2, 2)
    of_steps(first, 3)
    if lives == 2:
        first = run.ranks(4, 1, saved(first[1]))
        of_steps(first, 1)
    other, state = dataclasses.replace(run, seed=4), saved(first[0])
    message = "the first batch of epoch 0 has other samples"
    if (world_size, batch_size) == (state["world_size"], state["batch_size"]):  # found out when the order is drawn
        (loader, *_) = other.ranks(world_size, batch_size, state)
        for _ in range(2):
            with pytest.raises(LoaderStateError, match=message):
                next(loader)
    else:
        with pytest.raises(LoaderStateError, match=message):
            other.ranks(world_size, batch_size, state)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (1, 3), (2, 2)])
def test_another_class_of_sampler_is_found_out(world_size, batch_size):
    first = RepeatingLoader(DataLoader(range(20), batch_size=2, shuffle=True))
    take(first, 3)
    with pytest.raises(LoaderStateError, match="the first batch of epoch 0 has other samples"):
        next(Run(20, False, False).ranks(world_size, batch_size, saved(first))[0])


# Other ways to divide


class Strided(Sampler):
    """Divides as DistributedSampler does, but is none; it works out at once or as it goes."""

    def __init__(self, dataset, num_replicas, rank, eager):
        self.dataset, self.num_replicas, self.rank, self.epoch = dataset, num_replicas, rank, 0
        if eager:
            self.num_samples = math.ceil(len(dataset) / num_replicas)
            self.total_size = self.num_samples * num_replicas

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return getattr(self, "num_samples", math.ceil(len(self.dataset) / self.num_replicas))

    def __iter__(self):
        order = torch.randperm(len(self.dataset), generator=seeded(self.epoch)).tolist()
        total = getattr(self, "total_size", len(self) * self.num_replicas)
        order += order[: total - len(order)]
        return iter(order[self.rank : total : self.num_replicas])


class Blocks(Strided):
    def __iter__(self):
        order = torch.randperm(len(self.dataset), generator=seeded(self.epoch)).tolist()
        return iter(order[self.rank * len(self) : (self.rank + 1) * len(self)])


def ranks_of(kind, world_size, batch_size, state=None, *, eager=True):
    samplers = [kind(range(24), world_size, rank, eager) for rank in range(world_size)]
    loaders = [RepeatingLoader(DataLoader(range(24), batch_size=batch_size, sampler=sampler)) for sampler in samplers]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    return loaders


@pytest.mark.parametrize("eager", [True, False])
def test_a_sampler_that_divides_like_torch_may_change_its_ranks(eager):
    ranks = ranks_of(Strided, 2, 2, eager=eager)
    out = samples_of(of_steps(ranks, 2))
    others = ranks_of(Strided, 5, 1, saved(ranks[0]), eager=eager)
    out += samples_of(of_steps(others, 2))
    others = ranks_of(Strided, 3, 2, saved(others[4]), eager=eager)
    out += samples_of(of_steps(others, 1))
    assert sorted(out) == list(range(24))
    assert others[0].verify() == Coverage(epoch=0, length=24, seen=24, left=0, twice=0, lost=0, dropped=0)
    assert sorted(samples_of(of_steps(others, 4))) == list(range(24))
    assert others[0].epoch == 1


def test_a_sampler_that_divides_in_blocks_may_not():
    ranks = ranks_of(Blocks, 2, 2)
    of_steps(ranks, 2)
    for call in (lambda: ranks_of(Blocks, 3, 2, saved(ranks[0])), ranks[0].verify):
        with pytest.raises(LoaderStateError, match="Blocks divides its samples among ranks in another way"):
            call()


def test_a_sampler_that_divides_in_blocks_goes_on_with_the_same_ranks():
    ranks = ranks_of(Blocks, 2, 2)
    out = samples_of(of_steps(ranks, 2))
    again = [ranks_of(Blocks, 2, 2)[rank] for rank in range(2)]
    for loader, before in zip(again, ranks, strict=True):
        loader.load_state_dict(saved(before))
    assert sorted(out + samples_of(of_steps(again, 4))) == list(range(24))


# verify


def ledger_of(run, segments, batch):
    """A loader on 2 ranks that believes these segments."""
    loader = RepeatingLoader(run.dataloader(2, 0, 2))
    samples = segments[-1][2] + 4 * batch
    loader.load_state_dict({**saved(loader), "segments": segments, "batch": batch, "step": 9, "samples": samples})
    return loader


def test_verify_finds_samples_that_a_ledger_repeats():
    run = Run(40, False, False)
    right = ledger_of(run, [[4, 1, 0], [1, 3, 8], [2, 2, 20]], 1).verify()
    assert right == Coverage(epoch=0, length=40, seen=24, left=16, twice=0, lost=0, dropped=0)
    with pytest.raises(LoaderStateError, match="2 samples of epoch 0 come twice"):  # after 5 steps it is at 20
        ledger_of(run, [[2, 2, 0], [2, 2, 18]], 1).verify()


def test_verify_finds_samples_that_a_ledger_loses():
    run = Run(40, True, False)
    right = ledger_of(run, [[8, 4, 0], [2, 2, 32]], 1).verify()
    assert right == Coverage(epoch=0, length=40, seen=36, left=4, twice=0, lost=0, dropped=0)
    # Eight ranks with drop_last take 32 samples, and nobody the next four.
    with pytest.raises(LoaderStateError, match="1 samples of epoch 0 are lost"):
        ledger_of(run, [[8, 4, 0], [2, 2, 36]], 1).verify()


def test_verify_changes_nothing():
    def make():
        return RepeatingLoader(DataLoader(range(SIZE), batch_size=3, shuffle=True, generator=seeded()))

    expected = take(make(), 25)
    loader, seen = make(), []
    for _ in expected:
        before = saved(loader)
        loader.verify()
        assert saved(loader) == before
        seen += take(loader, 1)
        loader.verify()
    assert seen == expected


def test_verify_of_batches_that_another_sampler_cuts():
    sampler = BatchSampler(RandomSampler(range(SIZE), generator=seeded()), 4, True)
    loader = RepeatingLoader(DataLoader(range(SIZE), batch_sampler=sampler))
    take(loader, 2)
    assert loader.verify() == Coverage(epoch=0, length=SIZE, seen=8, left=12, twice=0, lost=3, dropped=3)

"""What draws random numbers, and from where."""

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from ds_loader import LoaderStateError, RepeatingLoader
from ds_loader._random import PrivateStreams, mixed, set_state, state_of
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SubsetRandomSampler

SIZE = 9


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def resumed(source, state, **options):
    loader = RepeatingLoader(source, **options)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


def global_states():
    return torch.random.get_rng_state().tolist(), random.getstate()


def stir(seed):
    """Another state of the global generators."""
    torch.manual_seed(seed)
    random.seed(seed)


class Order(Sampler):
    """A sampler of somebody else, that draws its order from what is given."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return SIZE

    def __iter__(self):
        yield from self.draw()


class Lazily(Order):
    """Draws when an index is asked for."""

    def __iter__(self):
        left = list(range(SIZE))
        while left:
            yield left.pop(self.draw(len(left)))


def by_torch():
    return torch.randperm(SIZE).tolist()


def by_python():
    return random.sample(range(SIZE), SIZE)


GLOBAL = {
    "torch": lambda: Order(by_torch),
    "random": lambda: Order(by_python),
    "torch, one by one": lambda: Lazily(lambda left: int(torch.randint(left, ()))),
    "random, one by one": lambda: Lazily(random.randrange),
}
every_global = pytest.mark.parametrize("make", GLOBAL.values(), ids=GLOBAL.keys())


# Nothing is drawn from the global generators


@pytest.mark.parametrize(
    "source",
    [
        lambda: DataLoader(range(SIZE), shuffle=True),
        lambda: DataLoader(range(SIZE), shuffle=True, num_workers=2),
        lambda: DataLoader(range(SIZE), sampler=SubsetRandomSampler(range(5))),
        lambda: DataLoader(range(SIZE), sampler=Order(by_torch)),
        lambda: list(range(SIZE)),
    ],
)
def test_wrapping_draws_nothing(source):
    stir(3)
    torch.nn.Linear(3, 3)
    bare = torch.nn.Linear(3, 3).weight
    stir(3)
    torch.nn.Linear(3, 3)
    made = source()
    before = global_states()
    loader = RepeatingLoader(made, seed=None)
    loader.state_dict()
    loader.load_state_dict(loader.state_dict())
    assert global_states() == before
    assert torch.equal(torch.nn.Linear(3, 3).weight, bare)


@every_global
def test_iterating_leaves_the_global_generators_alone(make):
    sources = [
        DataLoader(range(SIZE), batch_size=2, sampler=make()),
        DataLoader(range(SIZE), batch_size=2, shuffle=True),
        DataLoader(range(SIZE), batch_size=2, sampler=SubsetRandomSampler(range(7))),
    ]
    for source in sources:
        loader = RepeatingLoader(source)
        before = global_states()
        for _ in range(15):
            next(loader)
            state = loader.state_dict()
            loader.verify()
        loader.skip(7)
        take(resumed(source, state), 3)
        assert global_states() == before


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_starting_workers_leaves_them_alone_too():
    loader = RepeatingLoader(DataLoader(range(SIZE), batch_size=2, shuffle=True, num_workers=2))
    before = global_states()
    take(loader, 12)
    assert global_states() == before
    loader.close()


def test_a_dataset_draws_from_the_global_generators_as_ever():
    class Augments(Dataset):
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            return torch.rand(()).item()

    stir(4)
    by_hand = [batch.item() for batch in DataLoader(Augments(), batch_size=1, generator=seeded())]
    stir(4)
    loader = RepeatingLoader(DataLoader(Augments(), batch_size=1, generator=seeded()))
    assert [batch.item() for batch in itertools.islice(loader, SIZE)] == by_hand


# Samplers that draw from the global generators


@every_global
def test_such_a_sampler_has_another_order_every_epoch(make):
    loader = RepeatingLoader(DataLoader(range(SIZE), batch_size=None, sampler=make()))
    epochs = [tuple(take(loader, SIZE)) for _ in range(4)]
    assert len(set(epochs)) == 4
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)


@every_global
@pytest.mark.parametrize("batch_size", [None, 2])
def test_such_a_sampler_resumes_whatever_the_global_state(make, batch_size):
    stir(1)
    first = RepeatingLoader(DataLoader(range(SIZE), batch_size=batch_size, sampler=make()))
    expected = take(first, 30)
    for stop in range(21):
        stir(1)
        first = RepeatingLoader(DataLoader(range(SIZE), batch_size=batch_size, sampler=make()))
        seen = []
        for step in range(stop):
            stir(step)  # as a training step does
            seen += take(first, 1)
        assert seen == expected[:stop]
        stir(100 + stop)
        second = resumed(DataLoader(range(SIZE), batch_size=batch_size, sampler=make()), first.state_dict())
        assert take(second, 6) == expected[stop : stop + 6], f"stopped after {stop}"


@every_global
def test_such_a_sampler_goes_on_with_another_batch_size(make):
    first = RepeatingLoader(DataLoader(range(SIZE), batch_size=2, sampler=make()))
    out = [sample for batch in take(first, 2) for sample in batch]
    stir(7)
    second = resumed(DataLoader(range(SIZE), batch_size=5, sampler=make()), first.state_dict())
    out += take(second, 1)[0]
    assert sorted(out) == list(range(SIZE))
    assert second.verify().lost == 0


def test_a_stream_that_draws_from_the_global_generators_resumes():
    class Stream(IterableDataset):
        def set_epoch(self, epoch):
            pass

        def __iter__(self):
            return iter([(n, random.random(), torch.rand(()).item()) for n in range(SIZE)])

    stir(1)
    first = RepeatingLoader(DataLoader(Stream(), batch_size=None))
    states = [first.state_dict() for _ in range(20) if next(first)]
    expected = take(first, 3)
    stir(2)
    assert take(resumed(DataLoader(Stream(), batch_size=None), states[-1]), 3) == expected
    drawn = {tuple(sample[1:]) for sample in take(resumed(DataLoader(Stream(), batch_size=None), states[0]), 3 * SIZE)}
    assert len(drawn) == 3 * SIZE  # another in every epoch


# Samplers with generators of their own


class Own(Sampler):
    """Keeps its generator where it likes."""

    def __init__(self, name, generator):
        vars(self)[name] = generator
        self.name = name

    def __len__(self):
        return SIZE

    def __iter__(self):
        generator = vars(self)[self.name]
        if isinstance(generator, random.Random):
            return iter(generator.sample(range(SIZE), SIZE))
        return iter(torch.randperm(SIZE, generator=generator).tolist())


@pytest.mark.parametrize("name", ["generator", "rng", "_dice", "g"])
@pytest.mark.parametrize("generator", [lambda: random.Random(5), seeded], ids=["random", "torch"])
def test_own_generators_under_any_name(name, generator):
    def make():
        return DataLoader(range(SIZE), batch_size=2, sampler=Own(name, generator()))

    by_hand = [batch.tolist() for source in [make()] for _ in range(4) for batch in source]
    assert take(RepeatingLoader(make()), 20) == by_hand
    for stop in range(16):
        first = RepeatingLoader(make())
        take(first, stop)
        assert take(resumed(make(), first.state_dict()), 4) == by_hand[stop : stop + 4], f"stopped after {stop}"


def test_the_state_of_another_kind_of_generator_is_refused():
    from ds_loader import LoaderStateError

    first = RepeatingLoader(DataLoader(range(SIZE), sampler=Own("rng", random.Random(5))))
    second = RepeatingLoader(DataLoader(range(SIZE), sampler=Own("rng", seeded())))
    before = take(RepeatingLoader(DataLoader(range(SIZE), sampler=Own("rng", seeded()))), 3)
    with pytest.raises(LoaderStateError, match="is no state of a Generator"):
        second.load_state_dict(first.state_dict())
    assert take(second, 3) == before


def test_a_loader_that_is_wrapped_again_has_the_same_order():
    torch.manual_seed(1)
    source = DataLoader(range(SIZE), batch_size=2, shuffle=True)
    first = RepeatingLoader(source)
    expected = take(first, 12)
    assert take(RepeatingLoader(source), 12) == expected
    take(again := RepeatingLoader(source), 3)
    assert take(resumed(source, again.state_dict()), 9) == expected[3:]


# seed=


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomSampler(range(SIZE)),
        lambda: RandomSampler(range(SIZE), generator=seeded()),
        lambda: Own("rng", random.Random(5)),
        *GLOBAL.values(),
    ],
)
def test_a_seed_is_all_that_the_order_depends_on(make):
    def stream(seed, count, state=None):
        source = DataLoader(range(SIZE), batch_size=2, sampler=make())
        list(source)  # a generator may have been used before
        loader = RepeatingLoader(source, seed=seed)
        if state is not None:
            loader.load_state_dict(state)
        return loader, take(loader, count)

    stir(1)
    _, one = stream(7, 20)
    stir(2)
    _, again = stream(7, 20)
    assert one == again
    assert stream(8, 20)[1] != one
    assert len({str(one[n : n + 5]) for n in range(0, 20, 5)}) == 4  # another every epoch
    for stop in range(12):
        state = stream(7, stop)[0].state_dict()
        assert stream(7, 5, state)[1] == one[stop : stop + 5], f"stopped after {stop}"


PROGRAM = """
import itertools, random, sys, torch
from ds_loader import RepeatingLoader
from torch.utils.data import DataLoader
torch.manual_seed(int(sys.argv[1])); random.seed(int(sys.argv[1]))
loader = RepeatingLoader(DataLoader(range(9), batch_size=2, shuffle=True), seed=3)
print([batch.tolist() for batch in itertools.islice(loader, 12)])
"""


def test_two_processes_with_one_seed_have_one_order():
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy:UserWarning", "-c", PROGRAM]
    outputs = [
        subprocess.run([*command, str(seed)], capture_output=True, text=True, timeout=60, check=True).stdout
        for seed in (1, 2)
    ]
    assert outputs[0] == outputs[1]
    orders = [list(RandomSampler(range(9))) for epoch in range(3) if torch.manual_seed(mixed(3, epoch, -1))]
    by_hand = [order[start : start + 2] for order in orders for start in range(0, 9, 2)]
    assert json.loads(outputs[0]) == by_hand[:12]


def test_without_a_seed_the_order_follows_from_the_global_one():
    def stream(seed):
        torch.manual_seed(seed)
        return take(RepeatingLoader(DataLoader(range(SIZE), shuffle=True)), 20)

    assert stream(1) == stream(1) != stream(2)


# Private streams


def test_private_streams_follow_from_seed_and_epoch_and_go_on():
    def draw(streams):
        with streams:
            return torch.rand(2).tolist(), random.random()

    one, other = PrivateStreams(3, 1), PrivateStreams(3, 1)
    stir(1)
    first, second = draw(one), draw(one)
    stir(2)
    assert (first, second) == (draw(other), draw(other))
    assert first != second
    assert len({str(draw(PrivateStreams(*numbers))) for numbers in ((3, 1), (3, 2), (4, 1))}) == 3


def test_private_streams_restore_the_global_ones_after_an_exception():
    stir(1)
    before = global_states()
    streams = PrivateStreams(3, 1)

    def fails():
        with streams:
            torch.rand(3)
            random.random()
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert global_states() == before


def test_a_sampler_that_raises_leaves_the_global_generators_alone():
    def draw():
        yield from by_torch()[:3]
        random.random()
        raise OSError("no more")

    loader = RepeatingLoader(DataLoader(range(SIZE), sampler=Order(draw)))
    before = global_states()
    take(loader, 3)
    for _ in range(2):
        with pytest.raises(OSError, match="no more"):
            next(loader)
        assert global_states() == before


def test_private_streams_may_be_nested():
    stir(1)
    before = global_states()
    with PrivateStreams(3, 1) as outer:
        inside = global_states()
        with PrivateStreams(4, 1):
            torch.rand(3)
        assert global_states() == inside
        with outer:
            random.random()
    assert global_states() == before


# With numpy


def test_numpys_global_generator_is_private_too():
    np = pytest.importorskip("numpy")

    def make():
        return DataLoader(range(SIZE), batch_size=2, sampler=Order(lambda: np.random.permutation(SIZE).tolist()))

    np.random.seed(1)
    before = state_of(np.random.mtrand._rand)
    loader = RepeatingLoader(make())
    expected = take(loader, 20)
    assert state_of(np.random.mtrand._rand) == before
    assert len({str(expected[n : n + 5]) for n in range(0, 20, 5)}) == 4
    for stop in range(12):
        first = RepeatingLoader(make())
        assert take(first, stop) == expected[:stop]
        np.random.seed(stop)
        assert take(resumed(make(), first.state_dict()), 4) == expected[stop : stop + 4]

    def fails():
        with PrivateStreams(1, 1):
            np.random.rand()
            raise KeyError

    before = state_of(np.random.mtrand._rand)
    with pytest.raises(KeyError):
        fails()
    assert state_of(np.random.mtrand._rand) == before


@pytest.mark.parametrize("kind", ["default_rng", "RandomState", "Philox", "SFC64"])
def test_generators_of_numpy(kind):
    np = pytest.importorskip("numpy")

    class Permutes(Sampler):
        def __init__(self, rng):
            self.rng = rng

        def __len__(self):
            return SIZE

        def __iter__(self):
            return iter(self.rng.permutation(SIZE).tolist())

    def make():
        bits = getattr(np.random, kind)(5)
        rng = np.random.Generator(bits) if kind in ("Philox", "SFC64") else bits
        return DataLoader(range(SIZE), batch_size=2, sampler=Permutes(rng))

    by_hand = [batch.tolist() for source in [make()] for _ in range(4) for batch in source]
    for stop in range(12):
        first = RepeatingLoader(make())
        assert take(first, stop) == by_hand[:stop]
        assert take(resumed(make(), first.state_dict()), 4) == by_hand[stop : stop + 4]
    one, two = (take(RepeatingLoader(make(), seed=3), 20) for _ in range(2))
    assert one == two != by_hand
    assert len({str(one[n : n + 5]) for n in range(0, 20, 5)}) == 4


@pytest.mark.parametrize("make", [seeded, lambda: random.Random(3)], ids=["torch", "random"])
def test_a_state_of_a_generator_is_json_and_round(make):
    generator, other = make(), make()
    if isinstance(generator, random.Random):
        generator.gauss(0, 1)  # keeps one for the next call
    state = json.loads(json.dumps(state_of(generator)))
    set_state(other, state)
    assert state_of(other) == state_of(generator)


def test_a_seed_that_was_given_goes_with_the_state():
    def make(**seed):
        source = DataLoader(range(9), batch_size=2, sampler=RandomSampler(range(9), generator=seeded()))
        return RepeatingLoader(source, **seed)

    expected = take(make(seed=3), 20)
    for stop in range(12):
        first = make(seed=3)
        take(first, stop)
        second = make()  # whoever resumes need not know the seed
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, 20 - stop) == expected[stop:], f"stopped after {stop}"
    other = make()
    take(other, 1)
    with pytest.raises(LoaderStateError, match="seed: None in the state, 3 here"):
        make(seed=3).load_state_dict(other.state_dict())

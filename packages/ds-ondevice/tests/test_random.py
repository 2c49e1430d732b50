"""Constructors that move a random number generator: the values are those of eager construction."""

import threading

import pytest
import torch
from ds_ondevice import OnDevice, ReplayError, materialize
from torch import nn


class Built(nn.Module):
    """Draws before, in and after what ``how`` does."""

    def __init__(self, how):
        super().__init__()
        self.before = nn.Linear(3, 3)
        how(self)
        self.after = nn.Linear(3, 3)


def reseed(module):
    torch.manual_seed(5)
    module.one = nn.Linear(3, 3)


def reseed_twice(module):
    for name in ("one", "two"):
        torch.manual_seed(5)
        setattr(module, name, nn.Linear(3, 3))


def fork(module):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module.one = nn.Linear(3, 3)
    module.two = nn.Linear(3, 3)


def save_and_restore(module):
    state = torch.get_rng_state()
    module.one = nn.Linear(3, 3)
    torch.set_rng_state(state)
    module.two = nn.Linear(3, 3)


def track(module):
    """As Megatron's trackers do: streams by name, each going on where it was left."""
    states = {}
    for name, seed in (("model", 11), ("data", 12)):
        outer = torch.get_rng_state()
        torch.manual_seed(seed)
        states[name] = torch.get_rng_state()
        torch.set_rng_state(outer)
    for index, name in enumerate(("model", "data", "model", "model", "data")):
        outer = torch.get_rng_state()
        torch.set_rng_state(states[name])
        setattr(module, f"layer{index}", nn.Linear(3, 3))
        states[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


def bring(module):
    generator = torch.Generator().manual_seed(9)
    module.one = nn.Parameter(torch.randn(4, generator=generator))
    module.two = nn.Parameter(torch.empty(3, 3))
    nn.init.trunc_normal_(module.two, generator=generator)
    module.three = nn.Parameter(torch.empty(3, 3).uniform_(generator=generator))
    generator.manual_seed(9)
    module.four = nn.Parameter(torch.randn(4, generator=generator))


def bring_default(module):
    module.one = nn.Parameter(torch.randn(4, generator=torch.default_generator))


def draw_really(module):
    module.one = nn.Linear(3, 3)
    torch.manual_seed(5)
    torch.rand(3, device="cpu")
    module.two = nn.Linear(3, 3)


HOWS = [reseed, reseed_twice, fork, save_and_restore, track, bring, bring_default, draw_really]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generators_that_are_moved_are_followed(how, dtype):
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(1)
        eager = Built(how)
        follows = torch.rand(3)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(2)
    with OnDevice(dtype):
        model = Built(how)
    torch.manual_seed(1)
    assert materialize(model, "cpu").missing == ()
    for name, expected in eager.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name
    assert torch.equal(torch.rand(3, dtype=dtype), follows)


def test_a_seed_that_is_the_ambient_one_is_a_seed_all_the_same():
    torch.manual_seed(5)
    with OnDevice(torch.float32):
        torch.manual_seed(5)
        model = nn.Linear(3, 3)
    torch.manual_seed(77)
    materialize(model, "cpu")
    torch.manual_seed(5)
    assert torch.equal(model.weight, nn.Linear(3, 3).weight)


def test_a_block_leaves_the_generator_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with OnDevice(torch.float32):
        Built(fork)
    assert torch.equal(torch.get_rng_state(), before)
    with OnDevice(torch.float32):
        torch.manual_seed(8)
        nn.Linear(2, 2)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(8).get_state())


def test_what_is_really_drawn_inside_is_what_it_would_be():
    torch.manual_seed(3)
    expected = torch.rand(700), torch.rand(3)
    torch.manual_seed(3)
    with OnDevice(torch.float32):
        nn.Linear(2, 2)
        drawn = torch.rand(700, device="cpu")
        assert torch.initial_seed() == 3
    assert torch.equal(drawn, expected[0])
    assert torch.equal(torch.rand(3), expected[1])
    assert torch.initial_seed() == 3


def test_a_generator_that_somebody_used_since_is_left_alone():
    generator = torch.Generator().manual_seed(4)
    with OnDevice(torch.float32):
        model = nn.ParameterList([torch.randn(3, generator=generator)])
    generator.manual_seed(6)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(6))
    materialize(model, "cpu")
    assert torch.equal(model[0], torch.randn(3, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(torch.rand(2, generator=generator), expected)


def test_a_part_of_a_model_is_that_of_the_whole():
    torch.manual_seed(1)
    eager = Built(track)
    with OnDevice(torch.float32):
        model = Built(track)
    torch.manual_seed(1)
    materialize(model.layer3, "cpu")
    assert torch.equal(model.layer3.weight, eager.layer3.weight)


def test_two_threads_at_once_still_get_values():
    inside, done = threading.Barrier(2, timeout=20), []

    def build():
        with OnDevice(torch.float32):
            inside.wait()
            model = nn.Linear(3, 3)
            inside.wait()
        materialize(model, "cpu")
        done.append(model.weight)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == 2
    assert not any(weight.is_meta or weight.isnan().any() for weight in done)
    torch.set_rng_state(before)


def test_a_state_that_the_device_does_not_have_is_an_error(monkeypatch):
    from ds_ondevice import _random

    with OnDevice(torch.float32):
        state = torch.Generator().manual_seed(1)
        torch.rand(3, device="cpu", generator=state)
        torch.set_rng_state(state.get_state())
        model = nn.Linear(2, 2)
    monkeypatch.setattr(
        _random.Positions, "_chosen", lambda self, draws: _random.Draw(None, "cuda", state=draws[0].state)
    )
    with pytest.raises(ReplayError, match="a state that no seed gives"):
        materialize(model, "cpu")
    assert model.weight.is_meta

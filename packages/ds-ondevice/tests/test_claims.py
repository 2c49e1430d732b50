"""Code below a block on meta takes the path that it takes without meta; the body of the block is told the truth."""

import contextlib

import pytest
import torch
from ds_ondevice import MetaValueError, OnDevice, UnrestorableError, materialize
from torch import nn


def is_on_meta_context():
    """As libraries look for a device context: with a tensor that they make for it."""
    return torch.tensor([]).device.type == "meta"


class Asking(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        if not how(self.linear.weight):
            nn.init.normal_(self.linear.weight, std=0.02)


HOWS = {
    "is_meta": lambda weight: weight.is_meta,
    "device": lambda weight: weight.device.type == "meta",
    "device of a part": lambda weight: weight[0].device == torch.device("meta"),
    "is_cpu": lambda weight: not weight.is_cpu,
    "an empty tensor": lambda weight: is_on_meta_context(),
    "another tensor": lambda weight: torch.zeros(2).device.type == "meta",
    "default device": lambda weight: torch.get_default_device().type == "meta",
    "get_device": lambda weight: weight.get_device() != -1,
}


def eager(build):
    torch.manual_seed(3)
    return build()


def restored(build, dtype=torch.float32):
    with OnDevice(dtype):
        module = build()
    torch.manual_seed(3)
    materialize(module, "cpu")
    return module


def assert_equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype is theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_code_that_asks_for_meta_initialises_as_in_eager(how):
    assert_equal(eager(lambda: Asking(how)), restored(lambda: Asking(how)))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.device = self.weight.device
        self.register_buffer("steps", torch.arange(4, device=self.weight.device) * 2)
        self.register_buffer("moved", torch.eye(4).to(self.device))
        self.register_buffer("like", self.weight.new_zeros(2, device=self.device) + 1)

    def forward(self):
        return self.weight + torch.ones(4, device=self.device)


def test_the_device_that_is_claimed_can_be_given_back():
    with OnDevice(torch.float32):
        module = Table()
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    materialize(module, "cpu")
    assert_equal(Table(), module)
    assert module().device.type == "cpu"


def test_a_device_that_is_spelled_out_is_taken_as_it_is():
    with OnDevice(torch.float32):
        assert torch.ones(2, device="cpu").device.type == "cpu"
        assert torch.ones(2, device=torch.device("cpu")).tolist() == [1, 1]


def test_the_body_of_the_block_is_told_the_truth():
    with OnDevice(torch.float32):
        weight = nn.Linear(2, 2).weight
        assert weight.is_meta
        assert not weight.is_cpu
        assert all(part.is_meta for part in (weight, weight[0]))
        assert (lambda: weight.device.type)() == "meta"
        assert is_on_meta_context() is False
    with contextlib.ExitStack() as stack:
        stack.enter_context(OnDevice(torch.float32))
        assert torch.ones(2).is_meta

    @OnDevice(torch.float32)
    def build():
        return torch.ones(2).is_meta, is_on_meta_context()

    assert build() == (True, False)
    assert weight.is_meta


def test_torch_is_told_the_truth():
    with OnDevice(torch.float32):
        tensor = torch.empty(3, 3)
        nn.init.orthogonal_(tensor)
    with pytest.raises(RuntimeError):
        tensor.tolist()


def test_other_blocks_and_threads_claim_nothing():
    def asks():
        return torch.ones(1).is_meta

    with OnDevice(torch.float32), torch.device("meta"):
        assert asks()
    with torch.device("meta"):
        assert asks()
    with OnDevice(torch.float32, "cpu"):
        assert not asks()
        outside = torch.ones(1, device="meta")

        def about():
            return outside.is_meta

        assert about()


MOVES = {
    "half": lambda: nn.Linear(8, 8).half(),
    "to float64": lambda: nn.Linear(8, 8).to(torch.float64),
    "channels_last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "bfloat16": lambda: nn.TransformerEncoderLayer(8, 2).bfloat16(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moves_inside_the_block_are_recorded(move):
    assert_equal(eager(move), restored(move))


def assigned():
    module = nn.Linear(3, 3)
    module.weight.data = torch.full((3, 3), 2.0)
    module.weight.data.mul_(2)
    with torch.no_grad():
        module.weight.add_(1)
    module.bias.data = nn.functional.pad(module.bias.data, (0, 0))
    return module


def test_data_that_is_assigned_is_recorded():
    assert_equal(eager(assigned), restored(assigned))


def positions():
    module = nn.Module()
    module.register_buffer("scaled", torch.arange(6) * 0.3)
    module.register_buffer("powers", 1.0 / 10000 ** (torch.arange(0, 6, 2) / 6))
    module.register_buffer("waves", torch.sin(torch.arange(4)))
    module.register_buffer("counts", torch.arange(6) * 2)
    module.register_buffer("told", torch.arange(6).float() * 0.3)
    module.register_buffer("told_too", torch.arange(6).to(torch.float64) / 3)
    return module


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_integers_become_what_they_become_under_set_default_dtype(dtype, device):
    with OnDevice(dtype, device):
        module = positions()
    materialize(module, "cpu")
    torch.set_default_dtype(dtype)
    try:
        expected = positions()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(expected, module)


VALUES = {
    "a mask": lambda: torch.arange(10)[torch.arange(10) % 2 == 0],
    "nonzero": lambda: torch.nonzero(torch.tensor([0, 1, 1])),
    "unique": lambda: torch.unique(torch.tensor([2, 1, 1])),
    "equal": lambda: torch.ones(2) if torch.equal(torch.ones(2), torch.ones(2)) else torch.zeros(2),
    "allclose": lambda: torch.ones(2) if torch.allclose(torch.ones(2), torch.ones(2)) else torch.zeros(2),
    "numpy": lambda: torch.tensor(torch.arange(4).numpy() * 2),
    "repeat_interleave": lambda: torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor([1, 2])),
    "bincount": lambda: torch.bincount(torch.tensor([0, 1, 1])),
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_what_needs_values_is_computed(make):
    if make is VALUES["numpy"]:
        pytest.importorskip("numpy")

    def build():
        module = nn.Module()
        module.register_buffer("made", make() + 0)
        return module

    with OnDevice(torch.float32):
        assert build().made.is_meta
    assert_equal(build(), restored(build))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: torch.nonzero(torch.rand(3)), "nonzero"),
        (lambda: torch.equal(torch.rand(3), torch.rand(3)), "equal"),
        (lambda: torch.unique(torch.rand(3)), "unique"),
    ],
)
def test_what_needs_values_that_are_drawn_later_is_named(act, name):
    with OnDevice(torch.float32), pytest.raises(MetaValueError, match=rf"{name}.* needs values: .*draws its random"):
        act()


def test_an_error_that_is_not_of_meta_is_as_ever():
    with OnDevice(torch.float32):
        with pytest.raises(RuntimeError, match="broadcast"):
            torch.ones(2) + torch.ones(3)
        with pytest.raises(TypeError):
            torch.ones(2).view("a")


@pytest.mark.parametrize("name", ["orthogonal_", "dirac_", "sparse_", "trunc_normal_"])
def test_initialisers_that_somebody_wrapped_count_as_what_they_are(name, monkeypatch):
    original = getattr(nn.init, name)
    monkeypatch.setattr(nn.init, name, lambda *args, **kwargs: original(*args, **kwargs))
    arguments = {"sparse_": (0.5,)}.get(name, ())

    def build():
        module = nn.Conv1d(6, 6, 3, bias=False) if name == "dirac_" else nn.Linear(6, 6, bias=False)
        getattr(nn.init, name)(module.weight, *arguments)
        return module

    assert_equal(eager(build), restored(build))


def test_an_operator_without_a_meta_kernel_is_recorded():
    def build():
        module = nn.Linear(4, 3)
        factors, scales = torch.geqrf(module.weight.detach())
        module.register_buffer("factors", factors)
        module.register_buffer("scales", scales)
        return module

    assert_equal(eager(build), restored(build))
    assert_equal(*(make(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 4))) for make in (eager, restored)))


def test_a_fallback_that_fails_leaves_the_module_as_it_was():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.table = [torch.ones(2, device="meta")]
    before = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}

    def fail(part):
        part.weight = None
        raise KeyError("no")

    with pytest.raises(KeyError):
        materialize(module, "cpu", fallback=fail)
    assert {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()} == before
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers(), *module.table))


class Wrapper(torch.Tensor):
    """A tensor that wraps another, as those of quantized weights do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        made = func(*plain, **(kwargs or {}))
        return cls(made) if func is torch.ops.aten.detach.default else made


class Wrapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(Wrapper(torch.ones(2)), requires_grad=False)


def test_a_tensor_that_wraps_others_is_where_they_are_and_is_refused_by_name():
    with OnDevice(torch.float32):
        model = Wrapping()
    assert model.weight.is_meta
    with pytest.raises(UnrestorableError, match="weight: Wrapper tensors are not supported"):
        materialize(model, "cpu")

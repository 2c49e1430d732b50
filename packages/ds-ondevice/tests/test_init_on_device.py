import asyncio
import inspect
import threading

import pytest
import torch
from ds_ondevice import MetaValueError, OnDevice, init_on_device, materialize
from torch import nn


def snapshot():
    """What the incumbent patches, and the function and dispatch modes in force."""
    names = ("empty", "zeros", "ones", "full", "tensor", "rand")
    return (
        [getattr(torch, name) for name in names],
        torch.Tensor.__new__,
        hasattr(torch.Tensor, "__old_new__"),
        torch.get_default_dtype(),
        torch.overrides._get_current_function_mode_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    )


def test_the_module_holds_the_one_name():
    assert init_on_device.__all__ == ["OnDevice"]
    assert list(inspect.signature(OnDevice).parameters) == [
        "dtype",
        "device",
        "enabled",
        "include_buffers",
        "skip_init",
        "record",
    ]
    assert list(inspect.signature(OnDevice.fp_tensor_constructor).parameters) == ["self", "fn", "target_fp_dtype"]
    assert list(inspect.signature(OnDevice.get_new_tensor_fn_for_dtype).parameters) == ["self", "dtype"]
    assert list(inspect.signature(OnDevice.__exit__).parameters) == ["self", "exc_type", "exc_value", "traceback"]
    assert inspect.signature(OnDevice).parameters["device"].default == "meta"
    assert inspect.signature(OnDevice).parameters["enabled"].default is True


def test_nothing_is_patched_inside():
    before = snapshot()
    with OnDevice(torch.float16):
        inside = snapshot()
    assert inside[:4] == before[:4]
    assert snapshot() == before


def test_everything_is_restored_after_an_exception():
    before = snapshot()
    with pytest.raises(KeyError, match="boom"), OnDevice(torch.float16), OnDevice(torch.bfloat16, device="cpu"):
        raise KeyError("boom")
    assert snapshot() == before
    assert torch.Tensor([1.0]).device.type == "cpu"


def test_another_thread_notices_nothing():
    entered, looked = threading.Event(), threading.Event()
    made = []

    def build():
        entered.wait(10)
        made.append(nn.Linear(2, 2).weight)
        made.append(torch.Tensor(2))
        looked.set()

    thread = threading.Thread(target=build)
    thread.start()
    with OnDevice(torch.float16):
        entered.set()
        assert looked.wait(10)
        assert torch.zeros(1).is_meta
    thread.join()
    assert [(t.device.type, t.dtype) for t in made] == [("cpu", torch.float32)] * 2


def test_one_object_in_two_threads_at_once():
    block = OnDevice(torch.float16)
    barrier = threading.Barrier(2, timeout=10)
    made = []

    def work(first_out):
        with block:
            barrier.wait()
            made.append(torch.zeros(1).is_meta)
            if not first_out:
                barrier.wait()
                made.append(torch.zeros(1).is_meta)  # the other thread has left its block
        if first_out:
            made.append(torch.zeros(1).is_meta)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(flag,)) for flag in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, True, True, True]


def test_blocks_nest_and_the_outer_one_goes_on():
    with OnDevice(torch.float16, device="meta"):
        with OnDevice(torch.bfloat16, device="cpu"):
            inner = torch.zeros(1)
        outer = torch.zeros(1)
        legacy = torch.Tensor(1)
    assert (inner.dtype, inner.device.type) == (torch.bfloat16, "cpu")
    assert (outer.dtype, outer.device.type) == (torch.float16, "meta")
    assert (legacy.dtype, legacy.device.type) == (torch.float16, "meta")


def test_one_object_may_be_entered_again():
    block = OnDevice(torch.float16)
    with block as entered:
        assert entered is block
        with block:
            assert torch.zeros(1).is_meta
        assert torch.zeros(1).is_meta
    assert not torch.zeros(1).is_meta


def test_disabled_does_nothing():
    with OnDevice(torch.float16, enabled=False):
        tensor = torch.zeros(1)
    assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")


def test_as_a_decorator():
    @OnDevice(torch.float16)
    def build(width, *, depth):
        """Build it."""
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    model = build(3, depth=2)
    assert [p.dtype for p in model.parameters()] == [torch.float16] * 4
    assert all(p.is_meta for p in model.parameters())
    assert build.__doc__ == "Build it."
    assert not torch.zeros(1).is_meta


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, 16, torch.bool])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch.dtype"):
        OnDevice(dtype)


@pytest.mark.parametrize("device", ["nowhere", None, 1.5])
def test_wrong_device(device):
    with pytest.raises(ValueError, match="device must name a torch device"):
        OnDevice(torch.float16, device=device)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Embedding(10, 4, padding_idx=1),
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        lambda: nn.LSTM(4, 5, 2, bidirectional=True),
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.BatchNorm2d(3),
        lambda: nn.LayerNorm(3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    ],
    ids=lambda build: build.__code__.co_names[-1],
)
def test_modules_of_torch(build, device):
    with OnDevice(torch.bfloat16, device=device):
        module = build()
    tensors = [*module.parameters(), *module.buffers()]
    assert tensors
    assert {t.device.type for t in tensors} == {device}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())


def test_fp_tensor_constructor():
    make = OnDevice(torch.bfloat16).fp_tensor_constructor(torch.ones, torch.float16)
    assert (make(2).dtype, make(2).is_meta) == (torch.float16, True)
    assert make(2, dtype=torch.float64).dtype is torch.float64
    assert make(2, dtype=torch.int32).dtype is torch.int32
    assert make(2, device="cpu").device.type == "cpu"
    assert make(2, requires_grad=True).is_leaf
    assert not torch.ones(2).is_meta


def test_get_new_tensor_fn_for_dtype():
    new = OnDevice(torch.bfloat16).get_new_tensor_fn_for_dtype(torch.float16)
    made = new(torch.Tensor, 2, 3)
    assert (made.shape, made.dtype, made.is_meta) == ((2, 3), torch.float16, True)
    assert new(torch.Tensor, [1.0]).shape == (1,)
    assert isinstance(new(nn.Parameter, 2), nn.Parameter)


def test_an_explicit_none_as_in_module_constructors():
    with OnDevice(torch.float16):
        assert nn.Linear(2, 2, device=None, dtype=None).weight.dtype is torch.float16
        assert nn.Linear(2, 2, dtype=torch.float64).weight.dtype is torch.float64
        assert nn.Linear(2, 2, device="cpu").weight.device.type == "cpu"


def test_dtype_may_be_left_out_or_named():
    with OnDevice():
        assert torch.ones(1).dtype is torch.float32
    for name in ("bfloat16", "torch.bfloat16"):
        with OnDevice(name, "cpu"):
            assert torch.ones(1).dtype is torch.bfloat16
    for wrong in ("int8", "bf17", "nn", 16):
        with pytest.raises(TypeError, match="dtype must"):
            OnDevice(wrong)


def test_generators_are_inside_while_their_code_runs():
    @OnDevice(torch.float32)
    def steps(count):
        """The docstring."""
        received = []
        try:
            for _ in range(count):
                received.append((yield torch.ones(1).device.type))
        except KeyError:
            received.append(torch.ones(1).device.type)
        return received

    running = steps(3)
    assert next(running) == "meta"
    assert torch.ones(1).device.type == "cpu"
    assert running.send("a") == "meta"
    with pytest.raises(StopIteration) as end:
        running.throw(KeyError())
    assert end.value.value == ["a", "meta"]
    assert (steps.__name__, steps.__doc__) == ("steps", "The docstring.")
    closed = steps(3)
    next(closed)
    closed.close()
    assert torch.ones(1).device.type == "cpu"
    assert list(steps(2)) == ["meta", "meta"]


def test_coroutines_are_inside_while_their_code_runs():
    seen = []

    @OnDevice(torch.float32)
    async def build(name):
        before = torch.ones(1).device.type
        await asyncio.sleep(0)
        return name, before, torch.ones(1).device.type

    async def beside():
        seen.append(torch.ones(1).device.type)
        await asyncio.sleep(0)
        seen.append(torch.ones(1).device.type)

    async def main():
        return await asyncio.gather(build("a"), beside(), build("b"))

    first, _, second = asyncio.run(main())
    assert (first, second) == (("a", "meta", "meta"), ("b", "meta", "meta"))
    assert seen == ["cpu", "cpu"]


def test_a_class_stays_a_class():
    @OnDevice(torch.float16)
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    class Larger(Model):
        pass

    assert isinstance(Model, type)
    assert isinstance(Larger(), Model)
    assert (Larger().linear.weight.is_meta, Model().linear.weight.dtype) == (True, torch.float16)


def test_what_cannot_be_decorated_is_refused():
    async def stream():
        yield 1

    for wrong in (stream, 3):
        with pytest.raises(TypeError, match="cannot be decorated"):
            OnDevice(torch.float32)(wrong)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_skip_init_draws_nothing(device):
    before = torch.get_rng_state()
    with OnDevice(torch.float32, device=device, skip_init=True):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
        for initialise in (nn.init.trunc_normal_, nn.init.orthogonal_, nn.init.xavier_uniform_):
            initialise(model[0].weight)
        fresh = torch.rand(3, device="cpu")
    torch.set_rng_state(before)
    assert torch.equal(torch.rand(3), fresh)
    report = materialize(model, "cpu")
    assert model[1].weight.tolist() == [1] * 4
    assert report.uninitialized == (("0.weight", "0.bias", "2.weight") if device == "meta" else ())


def test_buffers_can_be_left_real():
    with OnDevice(torch.float32, device="meta", include_buffers=False):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
        model.register_buffer("table", torch.arange(3.0) / 2)
    assert model.table.tolist() == [0, 0.5, 1]
    assert {name for name, buffer in model.named_buffers() if buffer.is_meta} == set()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert materialize(model, "cpu").restored == ("0.weight", "0.bias", "1.weight", "1.bias")
    with (
        pytest.raises(MetaValueError, match="draws its random numbers"),
        OnDevice(torch.float32, device="meta", include_buffers=False),
    ):
        model.register_buffer("noise", torch.rand(3))

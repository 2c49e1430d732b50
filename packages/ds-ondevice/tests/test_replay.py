import pytest
import torch
from ds_ondevice import OnDevice, ReplayError, materialize
from ds_ondevice._ops import View
from ds_ondevice._replay import as_tensor, fill
from torch import nn


def test_a_failing_operator_is_named_and_the_module_is_unchanged():
    with OnDevice(torch.bfloat16):
        model = nn.Module()
        model.weight = nn.Parameter(torch.linalg.qr(torch.ones(2, 2))[0])  # the CPU has none for bfloat16
    weight = model.weight
    with pytest.raises(ReplayError, match=r"aten\.linalg_qr.* failed on cpu: .*not implemented for 'BFloat16'"):
        materialize(model, "cpu")
    assert model.weight is weight
    assert model.weight.is_meta


def test_a_generator_is_used():
    def build(generator):
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(3).normal_(generator=generator))
        return module

    eager = build(torch.Generator().manual_seed(3))
    with OnDevice(torch.float32):
        module = build(torch.Generator().manual_seed(3))
    materialize(module, "cpu")
    assert torch.equal(module.weight, eager.weight)


@pytest.mark.parametrize("size", [(), (0,), (2, 3)])
def test_as_tensor(size):
    base = torch.arange(12.0)
    expected = base.as_strided(size, (3, 1)[: len(size)], 2)
    view = View(0, torch.float32, size, (3, 1)[: len(size)], 2)
    assert torch.equal(as_tensor(view, base.untyped_storage()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_fill_with_nan(dtype):
    tensor = torch.ones(3).to(dtype)
    fill(tensor)
    assert tensor.to(torch.complex64).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_fill_with_zero(dtype):
    tensor = torch.ones(3).to(dtype)
    fill(tensor)
    assert not tensor.any()


def random_program(seed, device):
    """A module whose tensors are made by a random sequence of views, writes, draws and new tensors."""
    pick = torch.Generator().manual_seed(seed)

    def choose(n):
        return int(torch.randint(n, (), generator=pick, device="cpu"))

    tensors = [torch.zeros(4, 4) for _ in range(3)]
    with torch.no_grad():
        for _ in range(40):
            a, b = tensors[choose(len(tensors))], tensors[choose(len(tensors))]
            step = choose(9)
            if step == 0:
                tensors.append(torch.randn(4, 4))
            elif step == 1:
                tensors.append(a.t())
            elif step == 2:
                tensors.append(a[1:3].repeat(2, 1))
            elif step == 3:
                a.add_(b.clone(), alpha=0.5)
            elif step == 4:
                a[choose(4)] = float(choose(5))
            elif step == 5:
                a.uniform_()
            elif step == 6:
                tensors.append(a @ b * 0.1)
            elif step == 7:
                a[:, 1:3].copy_(b[:, :2].clone())
            elif len(tensors) > 3:
                tensors.pop(choose(len(tensors)))
    return nn.ParameterList([nn.Parameter(t) for t in tensors[::2]])


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_replay_exactly(seed):
    torch.manual_seed(seed)
    eager = random_program(seed, "cpu")
    with OnDevice(torch.float32):
        module = random_program(seed, "meta")
    torch.manual_seed(seed)
    materialize(module, "cpu")
    assert len(module) == len(eager)
    for actual, expected in zip(module, eager, strict=True):
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)
    for i, one in enumerate(eager):
        for j, other in enumerate(eager):
            shared = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            assert (module[i].untyped_storage().data_ptr() == module[j].untyped_storage().data_ptr()) is shared


def test_of_tensors_that_are_cut_after_construction_one_at_a_time_is_in_memory(replay_peak):
    with OnDevice(torch.float32):
        layers = [nn.Linear(100, 100, bias=False) for _ in range(20)]
        shards = nn.ParameterList([layer.weight.data[:5].clone() for layer in layers])
    materialize(shards, "cpu")
    assert 4 * 100 * 100 <= replay_peak() <= 4 * (100 * 100 + 20 * 5 * 100)
    assert all(tuple(shard.shape) == (5, 100) for shard in shards)

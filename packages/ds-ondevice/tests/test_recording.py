import pytest
import torch
from ds_ondevice import MetaValueError, OnDevice
from torch import nn


def test_values_that_construction_needs_are_computed():
    with OnDevice(torch.float32):
        steps = torch.linspace(0, 1, 5)
        table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        table[0] = 7.0
        assert steps.is_meta
        assert steps[1].item() == 0.25
        assert steps.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert table.T.tolist() == [[7.0, 3.0], [7.0, 4.0]]
        assert bool((table > 2).all())
        assert float(table.sum()) == 21.0
        assert torch.tensor([table[1, 0], 5.0]).tolist() == [3.0, 5.0]
        assert table.cpu().numpy().tolist() == [[7.0, 7.0], [3.0, 4.0]]
        real = torch.zeros(2, device="cpu")
        real.copy_(table[1])
    assert real.tolist() == [3.0, 4.0]


def test_values_are_those_of_the_dtype():
    with OnDevice(torch.bfloat16):
        assert torch.tensor(0.1).item() == torch.tensor(0.1, dtype=torch.bfloat16, device="cpu").item()


def test_a_value_as_it_was_when_asked():
    with OnDevice(torch.float32):
        tensor = torch.zeros(1)
        first = tensor.item()
        tensor.add_(1)
        second = tensor.item()
    assert (first, second) == (0.0, 1.0)


def test_random_values_are_not_known_yet():
    with OnDevice(torch.float32), pytest.raises(MetaValueError, match=r"aten.rand.default draws its random numbers in"):
        torch.rand(3).sum().item()


def test_values_of_tensors_made_elsewhere_are_not_known():
    other = torch.ones(1, device="meta")
    with OnDevice(torch.float32):
        with pytest.raises(MetaValueError, match="made outside"):
            other.item()
        with pytest.raises(MetaValueError, match="made outside"):
            (other + 1).item()


def test_outside_the_block_meta_is_as_ever():
    with OnDevice(torch.float32):
        tensor = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        tensor.item()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_and_views_share_the_storage_that_carries_the_recording(device):
    with OnDevice(torch.float32, device=device):
        base = torch.ones(4)
        parameter = nn.Parameter(base)
    storages = {
        t.untyped_storage()._cdata for t in (base, parameter, parameter.data, parameter[1:], parameter.view(2, 2))
    }
    assert len(storages) == 1
    assert hasattr(parameter.untyped_storage(), "_ds_ondevice_mark") is (device == "meta")

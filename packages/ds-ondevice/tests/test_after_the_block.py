"""What happens to recorded tensors between the block and `materialize`."""

import copy
import functools
import gc
import pickle
import weakref
from dataclasses import dataclass

import pytest
import torch
from ds_ondevice import MaterializeError, OnDevice, UnrestorableError, is_deferred, materialize
from torch import nn


def linear(*, bias=True):
    with OnDevice(torch.float32):
        return nn.Linear(3, 3, bias=bias)


def old_style(model):
    def initialise(module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)

    model.apply(initialise)


WRITES = {
    "old style": old_style,
    "fill": lambda m: m.weight.data.fill_(1),
    "item": lambda m: m.weight.data.__setitem__(0, 1),
    "view": lambda m: m.weight.data.view(-1)[2:4].zero_(),
    "twice": lambda m: m.weight.data.data.add_(1),
    "out": lambda m: torch.add(m.bias.data, 1, out=m.weight.data[0]),
    "chunk": lambda m: m.weight.data.chunk(3)[1].zero_(),
    "copy": lambda m: m.weight.data.copy_(torch.ones(3, 3, device="meta")),
    "many": lambda m: torch._foreach_zero_([m.bias.data, m.weight.data]),
    "init": lambda m: nn.init.normal_(m.weight.data),
    "detach": lambda m: m.weight.detach().zero_(),
    "no grad": lambda m: nn.init.zeros_(m.weight),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_after_the_block_is_refused(how):
    model = linear()
    WRITES[how](model)
    with pytest.raises(UnrestorableError, match="weight: it was changed in place outside"):
        materialize(model, "cpu")
    assert model.weight.is_meta
    with pytest.raises(UnrestorableError):  # and again
        materialize(model, "cpu")


def test_a_write_to_a_buffer_after_the_block_is_refused():
    with OnDevice(torch.float32):
        model = nn.BatchNorm1d(3)
    model.running_mean.data.fill_(2)
    with pytest.raises(UnrestorableError, match="running_mean: it was changed in place outside"):
        materialize(model, "cpu")


READS = {
    "shape": lambda m: m.weight.data.shape,
    "norm": lambda m: m.weight.data.norm(),
    "clone": lambda m: m.weight.data.clone().zero_(),
    "set to itself": lambda m: setattr(m.weight, "data", m.weight.data),
    "forward": lambda m: m(torch.ones(2, 3, device="meta")),
}


@pytest.mark.parametrize("how", READS)
def test_reading_after_the_block_does_no_harm(how):
    model = linear()
    READS[how](model)
    torch.manual_seed(0)
    materialize(model, "cpu")
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(3, 3).weight)


def test_writes_in_a_later_block_are_recorded():
    model = linear()
    with OnDevice(torch.float32):
        model.weight.data.fill_(3)
        model.bias.data = torch.full((3,), 4.0)
    materialize(model, "cpu")
    assert model.weight.unique().tolist() == [3.0]
    assert model.bias.unique().tolist() == [4.0]


def test_guards_behave_as_parameters():
    model = linear()
    assert isinstance(model.weight, nn.Parameter)
    assert type(type(model.weight)(torch.ones(1), requires_grad=False)) is nn.Parameter
    assert type(model.weight + 1) is torch.Tensor
    again = pickle.loads(pickle.dumps(model))
    assert type(again.weight) is nn.Parameter
    empty = copy.deepcopy(model).to_empty(device="cpu")
    assert type(empty.weight) is nn.Parameter
    materialize(model, "cpu")
    assert type(model.weight) is nn.Parameter


def test_a_copy_made_after_the_block_is_named():
    with pytest.raises(UnrestorableError, match="weight: it was not made inside"):
        materialize(copy.deepcopy(linear()), "cpu")


def test_tensors_stay_the_objects_that_they_are():
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight, mean = model[0].weight, model[1].running_mean
    weight.note = "mine"
    seen = []
    weight.register_hook(lambda grad: seen.append("hook"))
    weight.register_post_accumulate_grad_hook(lambda tensor: seen.append("after"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = materialize(model, "cpu")
    assert report.replaced == ()
    assert model[0].weight is weight
    assert model[1].running_mean is mean
    assert weight.note == "mine"
    before = weight.detach().clone()
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    assert seen == ["hook", "after"]
    assert not torch.equal(weight, before)


def test_what_something_else_holds_on_to_is_replaced_and_listed():
    model = linear()
    kept, weight = weakref.ref(model.bias), model.weight
    report = materialize(model, "cpu")
    assert report.replaced == ("bias",)
    assert model.weight is weight
    assert model.bias is not kept()
    assert not model.bias.is_meta


def test_a_failure_swaps_everything_back():
    with torch.device("meta"):
        unknown = nn.Linear(2, 2)
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(2, 2), unknown)
        model.device = torch.device("meta")
    before = dict(model.named_parameters())

    def fail(module):
        raise KeyError("no")

    with pytest.raises(KeyError):
        materialize(model, "cpu", fallback=fail)
    assert all(tensor is before[name] and tensor.is_meta for name, tensor in model.named_parameters())
    assert model.device.type == "meta"
    assert "0.weight" in materialize(model, "cpu", fallback=lambda module: module.reset_parameters()).restored


@functools.lru_cache
def table(length):
    return torch.arange(length)


@dataclass
class Held:
    tensor: torch.Tensor


class Helper:
    def __init__(self, tensor):
        self.inner = [{"tensor": tensor}]


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("doubled", table(4) * 2)
        self.held = Held(torch.ones(2))
        self.helper = Helper(nn.Parameter(torch.rand(3)))
        self.linear = nn.Linear(1, 1)
        self.device = self.linear.weight.device
        self.options = {"device": self.device}


def test_tables_in_a_cache_and_tensors_in_objects_are_found():
    table.cache_clear()
    with OnDevice(torch.float32):
        model = Keeping()
    other = model.held.tensor
    report = materialize(model, "cpu")
    assert report.strays == ("int64 (4,)",)
    assert {"held", "helper"} <= set(report.restored)
    assert model.held.tensor is other
    assert not other.is_meta
    assert not model.helper.inner[0]["tensor"].is_meta
    assert Keeping().doubled.tolist() == [0, 2, 4, 6]
    table.cache_clear()


def test_a_remembered_device_is_the_new_one():
    with OnDevice(torch.float32):
        model = Keeping()
        model.second = nn.Linear(1, 1)
        model.second.device = model.second.weight.device  # the block's own lines are told meta
    materialize(model, "cpu")
    assert model.device == model.options["device"] == model.second.device == torch.device("cpu")


def test_tensors_of_other_modules_of_the_block_are_left_alone():
    with OnDevice(torch.float32):
        one, two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        two.extra = torch.ones(1)
    materialize(one, "cpu")
    assert is_deferred(two)
    assert two.running_mean.is_meta
    assert two.extra.is_meta
    materialize(two, "cpu")
    assert not is_deferred(two)
    assert not two.extra.is_meta


def test_one_tensor_alone():
    torch.manual_seed(0)
    expected = torch.rand(2), torch.rand(2)[1:]
    with OnDevice(torch.float32):
        _, tensor = torch.rand(2), torch.rand(2)[1:].detach()
        parameter = nn.Parameter(torch.ones(2))
    torch.manual_seed(0)
    assert materialize(tensor, "cpu").restored == ("tensor",)
    assert torch.equal(tensor, expected[1])
    materialize(parameter, "cpu")
    assert parameter.tolist() == [1, 1]
    assert is_deferred(torch.empty(1, device="meta"))
    kept = linear().weight
    reference = weakref.ref(kept)
    with pytest.raises(MaterializeError, match="cannot be materialized in place"):
        materialize(kept, "cpu")
    assert reference().is_meta


def test_origins_die_with_their_modules():
    from ds_ondevice._modules import ORIGINS

    gc.collect()
    before = len(ORIGINS)
    model = linear()
    assert len(ORIGINS) == before + 1
    materialize(model, "cpu")
    assert len(ORIGINS) == before
    model = linear()
    del model
    gc.collect()
    assert len(ORIGINS) == before


def test_a_recorded_module_can_be_copied_and_its_tensors_made_parameters():
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.note = "kept"
    again = copy.deepcopy(model)
    assert type(again[0].weight) is nn.Parameter
    assert type(again[1].running_mean) is torch.Tensor
    assert again[1].running_mean.note == "kept"
    assert not isinstance(model[0].weight.detach(), nn.Parameter)
    model.one = nn.Parameter(model[0].weight)
    model.two = nn.Parameter(model[0].weight.data)
    model.three = nn.Parameter(model[1].running_var, requires_grad=False)
    torch.manual_seed(0)
    materialize(model, "cpu")
    torch.manual_seed(0)
    expected = nn.Linear(2, 2).weight
    for made in (model.one, model.two):
        assert type(made) is nn.Parameter
        assert torch.equal(made, expected)
    assert type(model.three) is nn.Parameter
    assert model.three.tolist() == [1, 1]


def test_a_copy_of_many_recorded_tensors_mixes_none_up():
    with OnDevice(torch.float32):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(30)))
    again = copy.deepcopy(model)
    for (name, tensor), other in zip(
        model.state_dict(keep_vars=True).items(), again.state_dict().values(), strict=True
    ):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
    assert len({id(tensor) for tensor in again.state_dict(keep_vars=True).values()}) == len(model.state_dict())


def test_without_a_recording_tensors_are_those_of_torch_device():
    with OnDevice(torch.bfloat16, record=False):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert type(model[0].weight) is nn.Parameter
    assert type(model[1].running_mean) is torch.Tensor
    assert (model[0].weight.dtype, model[0].weight.device.type) == (torch.bfloat16, "meta")
    with pytest.raises(UnrestorableError, match="it was not made inside"):
        materialize(model, "cpu")
    with pytest.raises(ValueError, match="include_buffers=False computes buffers"):
        OnDevice(record=False, include_buffers=False)

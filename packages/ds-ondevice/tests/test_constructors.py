"""What constructors of real libraries do, each pattern alone: the values are those of eager construction."""

import io
from types import SimpleNamespace

import pytest
import torch
from ds_ondevice import MetaValueError, OnDevice, materialize
from torch import nn


class Built(nn.Module):
    def __init__(self, build):
        super().__init__()
        build(self)


def norm_in_training(m):
    m.bn = nn.BatchNorm1d(3)
    m.bn(torch.arange(6.0).view(2, 3))


def instance_norm(m):
    m.norm = nn.InstanceNorm1d(3, track_running_stats=True)
    m.norm(torch.arange(12.0).view(2, 3, 2))


def real_draw(m):
    m.first = nn.Parameter(torch.randn(2))
    torch.randn(5, device="cpu")
    torch.empty(3, device="cpu").uniform_()
    nn.functional.dropout(torch.ones(4, device="cpu"))
    m.second = nn.Parameter(torch.randn(2))


def list_index(m):
    w = torch.arange(6.0).view(3, 2)
    w[[0, 2]] = 7.0
    w[range(1)] = torch.tensor([1.0, 2.0])
    m.register_buffer("picked", w[[2, 1]])
    m.register_buffer("pair", w[[0, 1], [1, 0]])
    m.register_buffer("mixed", w[[0, 1], 1:])


def names_by_number(m):
    for index in torch.arange(2):
        setattr(m, f"layer_{index}", nn.Linear(1, 1))
    m.note = nn.Linear(1, 1) if f"{torch.tensor(0.5):.2f}" == "0.50" else None
    m.text = repr(torch.tensor([1.0, 2.0]))


def known_generator(m):
    g = torch.Generator().manual_seed(3)
    scale = torch.randn(100, generator=g).square().mean().item()
    m.weight = nn.Parameter(torch.full((2,), scale))
    mask = torch.randperm(6, generator=g) < 3
    m.register_buffer("where", torch.where(mask)[0])
    m.after = nn.Linear(2, 2)


def moved_to_cpu(m):
    m.linear = nn.Linear(2, 2)
    m.to("cpu")
    m.copied = nn.Parameter(m.linear.weight.detach().cpu() * 2)
    m.moved = nn.Parameter(m.linear.weight.detach().to("cpu", torch.float64))


def kept_in_a_list(m):
    m.hidden = [nn.Linear(2, 2), {"inner": nn.BatchNorm1d(2)}]
    m.more = SimpleNamespace(layer=nn.Linear(2, 2))


def chosen(m):
    mask = torch.arange(3) > 1
    m.register_buffer("chosen", torch.where(mask, 0.1, 0.7))
    m.register_buffer("also", mask * 0.3)


BUILDS = [
    norm_in_training,
    instance_norm,
    real_draw,
    list_index,
    names_by_number,
    known_generator,
    moved_to_cpu,
    kept_in_a_list,
    chosen,
]


def tensors(module):
    found = dict(module.state_dict())
    for name in ("hidden", "more"):
        if hasattr(module, name):
            hidden = getattr(module, name)
            parts = [hidden[0], hidden[1]["inner"]] if isinstance(hidden, list) else [hidden.layer]
            for index, part in enumerate(parts):
                found.update({f"{name}.{index}.{key}": value for key, value in part.state_dict().items()})
    return found


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_as_eager(build, dtype, device):
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(1)
        eager = Built(build)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    with OnDevice(dtype, device):
        model = Built(build)
    if device == "meta":
        torch.manual_seed(1)
        assert materialize(model, "cpu").missing == ()
    actual, expected = tensors(model), tensors(eager)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype is value.dtype, name
        assert torch.equal(actual[name], value), name
    if dtype is torch.float32:  # another default dtype is printed, too
        assert getattr(model, "text", None) == getattr(eager, "text", None)


def test_modules_in_a_list_are_named():
    with OnDevice(torch.float32):
        model = Built(kept_in_a_list)
    restored = materialize(model, "cpu").restored
    assert {"hidden.weight", "hidden.running_mean", "more.weight"} <= set(restored)


def test_what_went_through_a_file_inside_the_block_has_no_value():
    with OnDevice(torch.float32):
        model, saved = nn.Linear(2, 2), io.BytesIO()
        torch.save(model.state_dict(), saved)
        saved.seek(0)
        model.load_state_dict(torch.load(saved))
    report = materialize(model, "cpu")
    assert report.restored == ()
    assert report.uninitialized == ("weight", "bias")


def test_what_is_computed_of_an_empty_tensor_has_no_value():
    with OnDevice(torch.float32):
        model = nn.Module()
        model.register_buffer("copied", torch.empty(3) + 1)
        model.register_buffer("filled", torch.zeros(3).copy_(model.copied).fill_(2))
    report = materialize(model, "cpu")
    assert report.uninitialized == ("copied",)
    assert report.restored == ("filled",)


def test_a_random_number_cannot_be_formatted():
    with pytest.raises(MetaValueError), OnDevice(torch.float32):
        Built(lambda m: f"{torch.rand(()):.2f}")
    with OnDevice(torch.float32):
        model = Built(lambda m: setattr(m, "text", f"{torch.rand(3)}"))
    assert "meta" in model.text


def test_a_number_drawn_for_real_after_recorded_ones_is_warned_of(caplog):
    with OnDevice(torch.float32):
        torch.rand(2, device="cpu")
        nn.Linear(2, 2)
    assert caplog.text == ""
    with OnDevice(torch.float32):
        nn.Linear(2, 2)
        torch.rand(2, device="cpu")
        torch.rand(2, device="cpu")
    assert caplog.text.count("were drawn on a real device inside") == 1


def test_a_parametrization_with_an_inverse():
    class Doubled(nn.Module):
        def forward(self, x):
            return x * 2

        def right_inverse(self, x):
            return x / 2

    def build(m):
        m.linear = nn.Linear(2, 2)
        nn.utils.parametrize.register_parametrization(m.linear, "weight", Doubled())

    torch.manual_seed(0)
    eager = Built(build)
    with OnDevice(torch.float32):
        model = Built(build)
    torch.manual_seed(0)
    materialize(model, "cpu")
    assert torch.equal(model.linear.weight, eager.linear.weight)

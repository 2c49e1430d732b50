import inspect

import pytest
import torch
from ds_ondevice import OnDevice, materialize
from torch import nn

INITIALIZERS = {
    "uniform_": {},
    "normal_": {"std": 0.02},
    "trunc_normal_": {"std": 0.02, "a": -0.03},
    "constant_": {"val": 3.0},
    "ones_": {},
    "zeros_": {},
    "eye_": {},
    "dirac_": {"groups": 1},
    "xavier_uniform_": {},
    "xavier_normal_": {"gain": 2.0},
    "kaiming_uniform_": {"a": 5**0.5},
    "kaiming_normal_": {},
    "orthogonal_": {"gain": 0.5},
    "sparse_": {"sparsity": 0.3},
}


def build(name):
    module = nn.Module()
    shape = (6, 5, 3) if name == "dirac_" else (6, 5)
    module.weight = nn.Parameter(torch.empty(shape))
    getattr(nn.init, name)(module.weight, **INITIALIZERS[name])
    module.after = nn.Parameter(torch.rand(3))  # shifted if the initialiser draws more or fewer numbers
    return module


@pytest.mark.parametrize("name", INITIALIZERS)
def test_every_initialiser_gives_what_it_gives_without_meta(name):
    torch.manual_seed(7)
    eager = build(name)
    with OnDevice(torch.float32):
        module = build(name)
    assert module.weight.is_meta
    torch.manual_seed(7)
    report = materialize(module, "cpu")
    assert torch.equal(module.weight, eager.weight)
    assert torch.equal(module.after, eager.after)
    assert report.restored == ("weight", "after")


def test_no_initialiser_of_torch_is_forgotten():
    public = {
        name
        for name, value in vars(nn.init).items()
        if inspect.isfunction(value) and name.endswith("_") and not name.startswith("_")
    }
    assert public <= set(INITIALIZERS)


def test_is_meta_still_tells_the_truth():
    with OnDevice(torch.float32):
        assert torch.zeros(1).is_meta is True
        assert torch.zeros(1, device="cpu").is_meta is False

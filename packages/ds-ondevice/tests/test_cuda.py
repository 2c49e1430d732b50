"""On a CUDA device: the values of eager construction there, from the same seed."""

import warnings

import pytest
import torch
from ds_ondevice import OnDevice, load_into, materialize
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 64, padding_idx=0)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        self.recurrent = nn.LSTM(64, 64, 2)
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0, 64, 2).float() / 64)), persistent=False)
        nn.init.trunc_normal_(self.transformer.encoder.layers[0].linear1.weight, std=0.02)
        nn.Linear(50, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_of_eager_construction_bit_for_bit(dtype):
    torch.manual_seed(5)
    with OnDevice(dtype, device="cuda"):
        eager = Model()
    after = torch.rand(4, device="cuda")
    with OnDevice(dtype, device="meta"):
        model = Model()
    torch.manual_seed(5)
    materialize(model, "cuda")
    assert torch.equal(torch.rand(4, device="cuda"), after)
    expected = {**dict(eager.named_parameters()), **dict(eager.named_buffers())}
    actual = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(actual[name], tensor), name


def test_an_lstm_is_one_chunk_of_memory_again():
    with OnDevice(torch.float32, device="meta"):
        model = nn.LSTM(8, 8, 2)
    materialize(model, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # cuDNN's wrapper warns about scattered weights at every call
        model(torch.randn(3, 1, 8, device="cuda"))


def test_real_tensors_are_moved_and_ties_among_them_kept():
    with OnDevice(torch.float32, device="meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].weight = model[1].weight = nn.Parameter(torch.ones(4, 4, device="cpu"))
        model.register_buffer("row", model[0].weight.data[1])
    report = materialize(model, "cuda")
    assert report.moved == ("row", "0.weight", "1.weight")
    assert model[0].weight is model[1].weight
    assert model.row.data_ptr() == model[0].weight[1].data_ptr()
    assert model[0].weight.device.type == "cuda"
    assert model.row.tolist() == [1.0] * 4


def test_legacy_constructors():
    array = torch.zeros(2).numpy()
    with OnDevice(torch.float16, device="cuda"):
        assert torch.Tensor([1.0]).device.type == "cuda"
        assert torch.Tensor(3).dtype is torch.float16
        assert torch.from_numpy(array).device.type == "cpu"


def reseed(module):
    torch.manual_seed(5)
    module.one = nn.Linear(3, 3)


def fork(module):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module.one = nn.Linear(3, 3)
    module.two = nn.Linear(3, 3)


def track(module):
    """As Megatron's trackers do with the states of the GPU's generator."""
    states = {}
    for name, seed in (("model", 11), ("data", 12)):
        outer = torch.cuda.get_rng_state()
        torch.cuda.manual_seed(seed)
        states[name] = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(outer)
    for index, name in enumerate(("model", "data", "model", "data")):
        outer = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(states[name])
        setattr(module, f"layer{index}", nn.Linear(3, 3))
        states[name] = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(outer)


def save_and_restore(module):
    state = torch.cuda.get_rng_state()
    module.one = nn.Linear(3, 3)
    torch.cuda.set_rng_state(state)
    module.two = nn.Linear(3, 3)


class Moving(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.before = nn.Linear(3, 3)
        how(self)
        self.after = nn.Linear(3, 3)


@pytest.mark.parametrize("how", [reseed, fork, track, save_and_restore], ids=lambda how: how.__name__)
def test_generators_that_are_moved_are_followed_on_cuda(how):
    torch.cuda.init()
    torch.manual_seed(1)
    with torch.device("cuda"):
        eager = Moving(how)
    torch.manual_seed(2)
    before = torch.cuda.get_rng_state()
    with OnDevice(torch.float32, device="meta"):
        model = Moving(how)
    if how is not reseed:
        assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.manual_seed(1)
    materialize(model, "cuda")
    for name, expected in eager.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name


def test_tensors_stay_the_objects_that_they_are_on_cuda():
    with OnDevice(torch.float32, device="meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
        model.device = torch.device("cpu")
        model.claimed = Asking().device
    weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    materialize(model, "cuda")
    assert model[0].weight is weight
    assert weight.is_cuda
    assert model.claimed.type == "cuda"
    assert model.device.type == "cpu"  # somebody said so
    before = weight.detach().clone()
    model(torch.randn(2, 3, 4, device="cuda"))[0].square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.device = self.linear.weight.device


def test_load_into_cuda(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    eager = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200))
    save_file(eager.state_dict(), tmp_path / "model.safetensors")
    with OnDevice(torch.bfloat16, device="meta"):
        model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200))
    load_into(model, tmp_path, "cuda")
    for name, expected in eager.state_dict().items():
        actual = model.state_dict()[name]
        assert actual.is_cuda
        assert torch.equal(actual.cpu(), expected.to(actual.dtype)), name

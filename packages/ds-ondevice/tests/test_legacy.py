import numpy as np
import pytest
import torch
from ds_ondevice import OnDevice

KINDS = {
    torch.Tensor: torch.float16,
    torch.FloatTensor: torch.float16,
    torch.DoubleTensor: torch.float64,
    torch.HalfTensor: torch.float16,
    torch.LongTensor: torch.int64,
    torch.BoolTensor: torch.bool,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("kind", "dtype"), KINDS.items())
def test_sizes(kind, dtype, device):
    with OnDevice(torch.float16, device=device):
        tensor = kind(3, 4)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((3, 4), dtype, device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("kind", "dtype"), KINDS.items())
def test_data(kind, dtype, device):
    with OnDevice(torch.float16, device=device):
        tensor = kind([1, 0])
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2,), dtype, device)
    if device == "cpu":
        assert tensor.tolist() == [1, 0]


def test_nothing_is_made_of_nothing():
    with OnDevice(torch.float16):
        assert torch.Tensor().shape == (0,)
        assert torch.Tensor([]).is_meta


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_from_numpy_still_shares_memory(dtype):
    array = np.zeros(2, dtype)
    with OnDevice(torch.float16):
        tensor = torch.from_numpy(array)
    array[0] = 3
    assert tensor[0].item() == 3
    assert tensor.dtype == torch.from_numpy(array).dtype


def test_frombuffer_still_shares_memory():
    data = bytearray(8)
    with OnDevice(torch.float16):
        tensor = torch.frombuffer(data, dtype=torch.float32)
    data[:] = np.array([1.0, 2.0], np.float32).tobytes()
    assert tensor.tolist() == [1.0, 2.0]


def test_the_random_state_can_be_read_and_set():
    with OnDevice(torch.float16):
        state = torch.get_rng_state()
        torch.set_rng_state(state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
    assert state.device.type == "cpu"
    drawn = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_inner_block_wins_over_outer():
    with OnDevice(torch.float16, device="meta"), OnDevice(torch.bfloat16, device="cpu"):
        tensor, data = torch.Tensor(2), torch.Tensor([1.0])
    assert (tensor.device.type, tensor.dtype) == ("cpu", torch.bfloat16)
    assert (data.device.type, data.dtype) == ("cpu", torch.bfloat16)
    with OnDevice(torch.float16, device="cpu"), OnDevice(torch.bfloat16, device="meta"):
        tensor, data = torch.Tensor(2), torch.Tensor([1.0])
    assert (tensor.device.type, tensor.dtype) == ("meta", torch.bfloat16)
    assert (data.device.type, data.dtype) == ("meta", torch.bfloat16)

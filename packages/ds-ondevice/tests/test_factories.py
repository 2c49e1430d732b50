import contextlib
import warnings

import numpy as np
import pytest
import torch
from ds_ondevice import OnDevice
from ds_ondevice._factories import FACTORIES
from torch.utils._device import _device_constructors

INDICES = torch.tensor([[0, 1], [0, 1]])
VALUES = torch.tensor([1.0, 2.0])
DOUBLES = np.array([1.0, 2.0])

CALLS = {
    "empty": lambda: torch.empty(2, 3),
    "empty_strided": lambda: torch.empty_strided((2, 3), (1, 2)),
    "empty_permuted": lambda: torch.empty_permuted((2, 3), (1, 0)),
    "zeros": lambda: torch.zeros(2),
    "ones": lambda: torch.ones(2),
    "rand": lambda: torch.rand(2),
    "randn": lambda: torch.randn(2),
    "eye": lambda: torch.eye(2),
    "linspace": lambda: torch.linspace(0, 1, 3),
    "logspace": lambda: torch.logspace(0, 1, 3),
    "scalar_tensor": lambda: torch.scalar_tensor(1),
    "bartlett_window": lambda: torch.bartlett_window(4),
    "blackman_window": lambda: torch.blackman_window(4),
    "hamming_window": lambda: torch.hamming_window(4),
    "hann_window": lambda: torch.hann_window(4),
    "kaiser_window": lambda: torch.kaiser_window(4),
    "fftfreq": lambda: torch.fft.fftfreq(4),
    "rfftfreq": lambda: torch.fft.rfftfreq(4),
    "full float": lambda: torch.full((2,), 1.0),
    "full keyword": lambda: torch.full(size=(2,), fill_value=1.0),
    "full int": lambda: torch.full((2,), 1),
    "full bool": lambda: torch.full((2,), True),
    "arange int": lambda: torch.arange(3),
    "arange float": lambda: torch.arange(3.0),
    "arange float step": lambda: torch.arange(0, 1, 0.5),
    "arange keyword": lambda: torch.arange(end=2.0),
    "tensor float": lambda: torch.tensor(1.0),
    "tensor list": lambda: torch.tensor([[1, 2.5], [3, 4]]),
    "tensor tuple": lambda: torch.tensor((1.0, 2.0)),
    "tensor int": lambda: torch.tensor([1, 2]),
    "tensor bool": lambda: torch.tensor([True]),
    "tensor empty": lambda: torch.tensor([[1], [2]]),
    "tensor complex": lambda: torch.tensor([1.0, 1j], dtype=torch.complex64),
    "tensor array": lambda: torch.tensor(DOUBLES),
    "tensor numpy scalar": lambda: torch.tensor(np.float64(1.0)),
    "tensor of tensors": lambda: torch.tensor([VALUES[0].double(), VALUES[1].double()]),
    "as_tensor list": lambda: torch.as_tensor([1.0]),
    "as_tensor array": lambda: torch.as_tensor(DOUBLES),
    "as_tensor tensor": lambda: torch.as_tensor(VALUES),
    "asarray list": lambda: torch.asarray([1.0]),
    "asarray array": lambda: torch.asarray(DOUBLES),
    "full numpy": lambda: torch.full((2,), np.float64(1.0)),
    "full tensor": lambda: torch.full((2,), VALUES[0]),
    "arange numpy": lambda: torch.arange(np.float32(2)),
    "arange tensor": lambda: torch.arange(VALUES[1]),
    "tensor numpy scalars": lambda: torch.tensor([1.0, np.float64(1.0)]),
    "tensor mixed": lambda: torch.tensor([VALUES[0].double(), 1.0]),
    "normal of tensors": lambda: torch.normal(VALUES, VALUES),
    "randint": lambda: torch.randint(3, (2,)),
    "randint float": lambda: torch.randint(3, (2,), dtype=torch.float32),
    "randperm": lambda: torch.randperm(3),
    "tril_indices": lambda: torch.tril_indices(2, 2),
    "triu_indices": lambda: torch.triu_indices(2, 2),
    "explicit dtype": lambda: torch.zeros(2, dtype=torch.float64),
    "explicit float32": lambda: torch.zeros(2, dtype=torch.float32),
    "dtype None": lambda: torch.zeros(2, dtype=None, device=None),
    "explicit device": lambda: torch.ones(2, device="cpu"),
    "zeros_like": lambda: torch.zeros_like(VALUES),
    "randn_like": lambda: torch.randn_like(torch.empty(2)),
    "full_like": lambda: torch.full_like(torch.empty(2), 3.0),
    "new_zeros": lambda: VALUES.new_zeros(2),
    "new_full": lambda: torch.empty(2).new_full((3,), 1.0),
    "new_tensor": lambda: torch.empty(2).new_tensor([1.0, 2.0]),
    "new_tensor outside": lambda: VALUES.new_tensor([1.0]),
    "from_numpy": lambda: torch.from_numpy(DOUBLES),
    "sparse_coo_tensor": lambda: torch.sparse_coo_tensor(INDICES, torch.ones(2), (2, 2)),
    "float()": lambda: torch.arange(2).float(),
}


@contextlib.contextmanager
def the_process_wide_way(dtype, device):
    """What PyTorch offers: the same for the whole process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "meta"), (torch.float64, "cpu"), (torch.float16, "cpu")]
)
def test_every_factory_makes_what_set_default_dtype_and_a_device_block_make(call, dtype, device):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Sparse invariant checks.*")
        torch.manual_seed(0)
        try:
            with the_process_wide_way(dtype, device):
                expected = call()
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"torch itself cannot: {error}")
        torch.manual_seed(0)
        with OnDevice(dtype, device=device):
            made = call()
    assert (made.dtype, made.device, made.shape, made.layout) == (
        expected.dtype,
        expected.device,
        expected.shape,
        expected.layout,
    )
    if not made.is_meta and made.layout is torch.strided and not any("empty" in n for n in call.__code__.co_names):
        torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)


def test_no_factory_that_torch_knows_of_is_forgotten():
    of_tensors = {torch.fill, torch.vander}  # torch 2.6 lists them too, but they follow the tensor that they are given
    assert _device_constructors() - of_tensors <= FACTORIES


@pytest.mark.parametrize("make", [torch.zeros, torch.rand, torch.empty])
def test_requires_grad_gives_a_leaf(make):
    with OnDevice(torch.float16, device="cpu"):
        tensor = make(3, requires_grad=True)
    assert tensor.is_leaf
    assert tensor.requires_grad
    assert tensor.dtype is torch.float16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_of_data_that_requires_grad_is_a_leaf(device):
    with OnDevice(torch.float16, device=device):
        tensor = torch.tensor([1.0], requires_grad=True)
    assert tensor.is_leaf
    assert tensor.requires_grad
    assert (tensor.dtype, tensor.device.type) == (torch.float16, device)


def test_complex_numbers_get_the_device_only():
    with OnDevice(torch.float16):
        assert torch.tensor([1j]).dtype is torch.complex64
        assert torch.full((2,), 1j).dtype is torch.complex64
        assert torch.tensor([1.0, 1j]).dtype is torch.complex64
        assert torch.linspace(0, 1j, 3).dtype is torch.complex64
        assert torch.tensor([1j]).is_meta


@pytest.mark.filterwarnings("ignore:torch.range is deprecated")
def test_range_gets_both():
    with OnDevice(torch.float16):
        made = torch.range(0, 2)
    assert (made.shape, made.dtype, made.is_meta) == ((3,), torch.float16, True)


def test_normal_gets_both():
    with OnDevice(torch.float16):
        made = torch.normal(0.0, 1.0, (2,))
        assert (made.dtype, made.is_meta) == (torch.float16, True)
        assert torch.normal(VALUES, VALUES).device.type == "cpu"


def test_out_is_left_alone():
    out = torch.empty(2)
    with OnDevice(torch.float16):
        assert torch.ones(2, out=out) is out
    assert out.tolist() == [1.0, 1.0]


def test_explicit_arguments_win_one_by_one():
    with OnDevice(torch.float16):
        assert torch.zeros(2, device="cpu").dtype is torch.float16
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.zeros(2, dtype=torch.float64).is_meta
        assert torch.zeros(2, dtype=torch.float32).dtype is torch.float32


def test_a_device_block_opened_inside_wins_even_if_it_names_the_default():
    with OnDevice(torch.float16):
        with torch.device("cpu"):
            inner = torch.zeros(2)
            legacy = torch.Tensor(2)
        assert torch.zeros(2).is_meta
    assert (inner.device.type, inner.dtype) == ("cpu", torch.float16)
    assert legacy.device.type == "cpu"


def test_a_device_block_around_it_loses():
    with torch.device("cpu"), OnDevice(torch.float16):
        assert torch.zeros(2).is_meta


def test_a_default_dtype_set_inside_wins():
    with OnDevice(torch.float16, device="cpu"):
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.zeros(2).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.zeros(2).dtype is torch.float16

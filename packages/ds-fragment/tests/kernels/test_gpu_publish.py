"""On a CUDA device: rounding at random, against the generator in plain torch, and its average against the truth."""

from __future__ import annotations

import random

import pytest
import torch
from ds_fragment import kernels
from ds_fragment.kernels import reference, use_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _kernels_must_run():
    with use_kernels("cuda"):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_rounding_is_the_references_bits(dtype: torch.dtype) -> None:
    rng = random.Random(str(dtype))
    for trial in range(150):
        numels = [rng.choice([0, rng.randrange(40), rng.randrange(30000)]) for _ in range(rng.randrange(1, 12))]
        srcs = []
        for numel in numels:
            bits = torch.randint(-(2**31), 2**31, (numel + 8,), device="cuda").to(torch.int32)
            value = (
                bits.view(torch.float32) if trial % 2 else torch.randn(numel + 8, device="cuda") * 10.0 ** -(trial % 9)
            )
            srcs.append(value[(skip := rng.randrange(8)) : skip + numel])
        outs = [torch.zeros(numel + 16, dtype=dtype, device="cuda") for numel in numels]
        expected = [out.clone() for out in outs]
        skips = [rng.randrange(8) for _ in numels]
        seed: int | torch.Tensor = rng.getrandbits(64)
        if trial % 3 == 0:
            seed = torch.tensor(seed >> 2, device="cuda")
        cut = [[o[k : k + n] for o, k, n in zip(some, skips, numels, strict=True)] for some in (outs, expected)]
        kernels.publish(cut[0], srcs, seed=seed)
        reference.publish(cut[1], srcs, seed=seed)
        for out, right in zip(outs, expected, strict=True):
            assert torch.equal(out.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 1e-6)], ids=str
)
def test_the_average_over_seeds_is_the_value(dtype: torch.dtype, size: float) -> None:
    values = torch.rand(1 << 18, device="cuda") * size + size / 3
    total = torch.zeros_like(values, dtype=torch.float64)
    out = torch.empty_like(values, dtype=dtype)
    seeds = 256
    for seed in range(seeds):
        kernels.publish([out], [values], seed=seed)
        total += out
    low = torch.minimum(out.double(), values.double())
    spacing = (torch.nextafter(out, out + 1).double() - out.double()).abs().amax()
    assert ((out.double() - values).abs() <= spacing).all(), low
    bias = (total / seeds - values.double()).mean() / spacing
    # Each rounding is off by at most half a spacing on average (standard deviation <= 0.5).
    assert abs(bias.item()) < 5 * 0.5 / (seeds * values.numel()) ** 0.5
    worst = ((total / seeds - values.double()) / spacing).abs().amax()
    assert worst.item() < 6.5 * 0.5 / seeds**0.5


def test_without_a_seed_it_rounds_to_nearest_even() -> None:
    values = torch.randn(100_003, device="cuda")
    out = torch.empty_like(values, dtype=torch.bfloat16)
    kernels.publish([out], [values])
    assert torch.equal(out, values.bfloat16())

"""On a CUDA device: gather_grads and norm against torch, and the same bits on every run."""

from __future__ import annotations

import random

import pytest
import torch
from ds_fragment import kernels
from ds_fragment.kernels import reference, use_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _kernels_must_run():
    with use_kernels("cuda"):
        yield


def ragged(rng: random.Random, dtype: torch.dtype | None = None, largest: int = 60000) -> list[torch.Tensor]:
    tensors = []
    for _ in range(rng.randrange(1, 40)):
        numel = rng.choice([0, rng.randrange(70), rng.randrange(3000), rng.randrange(largest)])
        kind = dtype or rng.choice(FLOATS)
        tensors.append(torch.randn(numel + 16, device="cuda").to(kind)[(skip := rng.randrange(16)) : skip + numel])
    return tensors


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, None], ids=str)
def test_gathered_gradients_are_torchs_bits(dtype: torch.dtype | None, accumulate: bool) -> None:
    rng = random.Random(f"{dtype} {accumulate}")
    for trial in range(120):
        grads = ragged(rng, dtype)
        scale: float | torch.Tensor = rng.choice([1.0, 0.37, 2.0**-16])
        if trial % 3 == 0:
            scale = torch.tensor(scale, device="cuda")
        if trial % 4 == 0:
            for value in (float("inf"), float("nan")):
                hit = grads[rng.randrange(len(grads))]
                hit[rng.randrange(hit.numel()) if hit.numel() else 0 :][:3] = value
        numels = [grad.numel() for grad in grads]
        skip = rng.randrange(5)
        flat = torch.randn(skip + sum(numels) + 3, device="cuda")
        expected = flat.clone()
        views = [f[skip:-3].split_with_sizes(numels) for f in (flat, expected)]
        found = [torch.zeros((), device="cuda") for _ in views]
        stats = kernels.gather_grads(views[0], grads, scale=scale, accumulate=accumulate, found_inf=found[0])
        right = reference.gather_grads(views[1], grads, scale=scale, accumulate=accumulate, found_inf=found[1])
        assert torch.equal(flat.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(flat.isnan(), expected.isnan())
        assert found[0].item() == found[1].item()
        torch.testing.assert_close(stats.values, right.values, rtol=1e-6, atol=0, equal_nan=True)
        assert stats.nonfinite.item() == (~flat[skip:-3].isfinite()).sum().item()


@pytest.mark.parametrize("dtype", [*FLOATS, None], ids=str)
def test_norm_is_right_and_always_the_same(dtype: torch.dtype | None) -> None:
    rng = random.Random(str(dtype))
    for trial in range(100):
        tensors = ragged(rng, dtype, largest=400000)
        if trial % 5 == 0:
            tensors[0].fill_(float("inf"))
            tensors[-1].fill_(float("nan"))
        stats = kernels.norm(tensors)
        whole = torch.cat([tensor.double().flatten() for tensor in tensors])
        broken = int((~whole.isfinite()).sum())
        assert stats.nonfinite.item() == broken
        if whole.numel():
            squares, largest = whole.square().sum(), whole.abs().amax()
            expected = torch.stack([squares, largest])
            torch.testing.assert_close(stats.values[:2], expected, rtol=1e-6, atol=0, equal_nan=True)
        for _ in range(3):
            assert torch.equal(kernels.norm(tensors).values.view(torch.int64), stats.values.view(torch.int64))


def test_gathering_gives_the_same_statistics_every_time() -> None:
    grads = [torch.randn(n, device="cuda").bfloat16() for n in (1 << 22, 77, 1_234_567)]
    dsts = [torch.empty(grad.numel(), device="cuda") for grad in grads]
    seen = {tuple(kernels.gather_grads(dsts, grads, scale=0.3).values.tolist()) for _ in range(50)}
    assert len(seen) == 1


def test_nothing_has_norm_zero() -> None:
    assert kernels.norm([torch.empty(0, device="cuda")]).values.tolist() == [0.0, 0.0, 0.0]


def test_strided_and_fp64_gradients_count_too() -> None:
    grid = torch.randn(64, 48, device="cuda")
    grads = [grid.t(), grid.double(), grid.bfloat16(), torch.full((4,), float("inf"), device="cuda")[::2]]
    dsts = [torch.empty(grad.numel(), device="cuda") for grad in grads]
    found = torch.zeros(1, device="cuda")
    stats = kernels.gather_grads(dsts, grads, scale=2.0, found_inf=found)
    assert torch.equal(dsts[0], grid.t().reshape(-1) * 2)
    assert stats.nonfinite.item() == 2
    assert found.item() == 1
    total = kernels.norm(grads[:3])
    expected = sum(grad.double().square().sum() for grad in grads[:3])
    torch.testing.assert_close(total.sum_squares, expected, rtol=1e-6, atol=0)

"""On a CUDA device: `FlatPartition` steps through the kernels as it does through torch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from ds_fragment import FlatPartition, use_kernels
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(5, 3), (), (0, 4), (70_001,), (1,), (128, 257), (64,), (3,)]  # the one of 64 is never used
SCALE = 512.0


def partition_of(dtype: torch.dtype) -> FlatPartition:
    generator = torch.Generator("cuda").manual_seed(0)
    return FlatPartition(
        [nn.Parameter(torch.randn(shape, generator=generator, device="cuda").to(dtype)) for shape in SHAPES]
    )


def gradients(dtype: torch.dtype, step: int) -> list[torch.Tensor | None]:
    """New tensors every time; the long one is left out of the second backward pass of a step, and one is strided."""
    generator = torch.Generator("cuda").manual_seed(step)
    made = [(torch.randn(shape, generator=generator, device="cuda") * SCALE).to(dtype) for shape in SHAPES]
    made[5] = made[5].t().contiguous().t()
    left_out = {(64,), *([(70_001,)] if step % 2 else [])}
    return [None if tuple(grad.shape) in left_out else grad for grad in made]


def dense(grads: list[torch.Tensor | None]) -> torch.Tensor:
    """float64, (numel,), unscaled."""
    numels = [torch.Size(shape).numel() for shape in SHAPES]
    zeros = [torch.zeros(numel, dtype=torch.float64, device="cuda") for numel in numels]
    return torch.cat([z if g is None else g.double().reshape(-1) / SCALE for z, g in zip(zeros, grads, strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_take_the_same_steps(dtype: torch.dtype) -> None:
    partitions = {kernels: partition_of(dtype) for kernels in ("cuda", "reference")}
    optimizers = {k: torch.optim.AdamW([p.hp_param], lr=0.01, fused=True) for k, p in partitions.items()}
    for step in range(4):
        found = {}
        for kernels, partition in partitions.items():
            with use_kernels(kernels):
                junk = torch.full((400_000,), float("nan"), device="cuda")  # what is allocated next may be this
                del junk
                for micro in range(2):
                    for param, grad in zip(partition.params, gradients(dtype, 2 * step + micro), strict=True):
                        param.grad = grad
                    stats = partition.reduce_gradients(scale=SCALE, accumulate=micro > 0)
                found[kernels] = (partition.hp_param.grad.clone(), stats)
                optimizers[kernels].step()
                partition.publish()
        (one, stats), (other, others) = found["cuda"], found["reference"]
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
        torch.testing.assert_close(stats.values, others.values, rtol=1e-6, atol=0)
        expected = sum(dense(gradients(dtype, 2 * step + micro)) for micro in range(2))
        torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.norm.double(), expected.norm(), rtol=1e-6, atol=0)
        assert stats.nonfinite == 0
        for a, b in zip(*(partition.params for partition in partitions.values()), strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("accumulate", [False, True])
def test_what_is_not_finite_is_counted(accumulate: bool) -> None:
    partition = partition_of(torch.bfloat16)
    with use_kernels("cuda"):
        for turn in range(2):
            for param, grad in zip(partition.params, gradients(torch.bfloat16, turn), strict=True):
                param.grad = grad
            if turn == 0:
                partition.params[3].grad[[0, 70_000]] = torch.tensor(
                    [float("inf"), float("nan")], device="cuda"
                ).bfloat16()
            stats = partition.reduce_gradients(accumulate=accumulate)
            assert stats.nonfinite == (2 if accumulate or turn == 0 else 0)
            assert stats.norm.isfinite() == (stats.nonfinite == 0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_one_rank_does_not_wait_for_the_device() -> None:
    partition = partition_of(torch.bfloat16)
    with use_kernels("cuda"):
        for step in range(3):
            for param, grad in zip(partition.params, gradients(torch.bfloat16, step), strict=True):
                param.grad = grad
            # The first step loads the library, and plans.
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                stats = partition.reduce_gradients(scale=SCALE, accumulate=step == 2)
                values = stats.norm, stats.nonfinite
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(value.device.type == "cuda" for value in values)
            assert partition.no_gradient(partition.params[0]) is None
            assert "no rank used" in str(partition.no_gradient(partition.params[6]))

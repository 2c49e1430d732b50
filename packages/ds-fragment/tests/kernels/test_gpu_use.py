"""On a CUDA device: graphs, torch.compile, streams, devices, and tensors that move."""

from __future__ import annotations

import gc

import pytest
import torch
from ds_fragment import kernels
from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels import use_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _kernels_must_run():
    with use_kernels("cuda"):
        yield


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(n, device="cuda").to(dtype) for n in (5, 70_001, 4096, 1)]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_graph_replays_after_the_work_is_forgotten(warm: bool) -> None:
    hp, lp = tensors(torch.float32), tensors(torch.bfloat16)
    out = [torch.zeros_like(x) for x in lp]
    rounded = [torch.zeros_like(x) for x in lp]
    seed = torch.tensor(1, device="cuda")
    scale = torch.tensor(0.5, device="cuda")

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        kernels.copy(out, hp)
        stats = kernels.gather_grads(hp, out, scale=scale, accumulate=True)
        kernels.publish(rounded, hp, seed=seed)
        return stats.values, kernels.norm(rounded).values

    if warm:
        work()
    start = [x.clone() for x in hp]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gathered, norm = work()
    gc.collect()
    junk = [torch.full((1 << 16,), 255, dtype=torch.uint8, device="cuda") for _ in range(50)]
    seen = set()
    for step in range(3):
        for x, first in zip(hp, start, strict=True):
            x.copy_(first * (step + 1))
        seed.fill_(step)
        scale.fill_(0.5 + step)
        graph.replay()
        torch.cuda.synchronize()
        for x, y, r, first in zip(hp, out, rounded, start, strict=True):
            low = (first * (step + 1)).bfloat16()
            assert torch.equal(y, low)
            expected = first * (step + 1) + low.float() * (0.5 + step)
            assert torch.equal(x, expected)
            assert ((r.float() - x).abs() <= x.abs() * 2**-7).all()
        squares = sum(x.double().square().sum() for x in hp)
        torch.testing.assert_close(gathered[0], squares, rtol=1e-6, atol=0)
        torch.testing.assert_close(norm[0], sum(r.double().square().sum() for r in rounded), rtol=1e-6, atol=0)
        seen.add(norm[0].item())
    assert len(seen) == 3
    assert len(junk) == 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_calls_the_kernels(backend: str) -> None:
    hp, lp = tensors(torch.float32), tensors(torch.bfloat16)

    def step(hp: list[torch.Tensor], lp: list[torch.Tensor]) -> torch.Tensor:
        kernels.copy(lp, [x * 2 for x in hp])
        stats = kernels.gather_grads(hp, lp, scale=0.5)
        kernels.publish(lp, hp, seed=3)
        return stats.values + kernels.norm(lp).values

    eager_hp, eager_lp = [x.clone() for x in hp], [x.clone() for x in lp]
    expected = step(eager_hp, eager_lp)
    found = torch.compile(step, backend=backend, fullgraph=True)(hp, lp)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for a, b in zip(hp + lp, eager_hp + eager_lp, strict=True):
        assert torch.equal(a, b)


def test_tensors_that_move_are_noticed() -> None:
    srcs, dsts = tensors(torch.float32), tensors(torch.bfloat16)
    kernels.copy(dsts, srcs)
    old = dsts[1].data
    srcs[2].data = torch.randn(4096, device="cuda")
    dsts[1].data = torch.zeros(70_001, dtype=torch.bfloat16, device="cuda")
    before = old.clone()
    srcs[1].fill_(3.0)
    kernels.copy(dsts, srcs)
    assert torch.equal(old, before)
    for src, dst in zip(srcs, dsts, strict=True):
        assert torch.equal(dst, src.bfloat16())
    dsts[0].data = torch.zeros(4, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(InvalidValueError, match=r"dsts\[0\] has 4 elements and srcs\[0\] 5"):
        kernels.copy(dsts, srcs)


def test_launches_go_to_the_current_stream() -> None:
    src, dst = torch.randn(1 << 20, device="cuda"), torch.zeros(1 << 20, dtype=torch.bfloat16, device="cuda")
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            src.normal_()
            kernels.copy([dst], [src])
            norm = kernels.norm([src])
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(dst, src.bfloat16())
        torch.testing.assert_close(norm.sum_squares, src.double().square().sum(), rtol=1e-6, atol=0)


def test_autograd_sees_what_was_written() -> None:
    weight = torch.randn(8, device="cuda", requires_grad=True)
    loss = (weight * weight).sum()
    kernels.copy([weight.detach()], [torch.ones(8, device="cuda")])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_device_in_one_process() -> None:
    for index in (1, 0, 1):
        src = torch.randn(100_001, device=f"cuda:{index}")
        dst = torch.empty(100_001, dtype=torch.bfloat16, device=f"cuda:{index}")
        kernels.copy([dst], [src])
        assert torch.equal(dst, src.bfloat16())
        norm = kernels.norm([src])
        torch.testing.assert_close(norm.sum_squares, src.double().square().sum(), rtol=1e-6, atol=0)
        assert torch.cuda.current_device() == 0
    both = [torch.randn(9, device="cuda:0"), torch.randn(9, device="cuda:1")]
    out = [torch.empty(9, dtype=torch.bfloat16, device=x.device) for x in both]
    kernels.copy(out, both)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(out, both, strict=True))

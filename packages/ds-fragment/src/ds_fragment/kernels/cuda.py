"""Launches: what a plan's kernel moves, and what is left to torch, as one operation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ds_fragment.kernels import reference
from ds_fragment.kernels.check import check_scalar
from ds_fragment.kernels.library import Work
from ds_fragment.kernels.plan import Plan
from ds_fragment.kernels.stats import Stats

Tensors = Sequence[torch.Tensor]


def copy(plan: Plan, dsts: Tensors, srcs: Tensors, marks: Tensors) -> None:
    """``dsts[i] = srcs[i]``; ``marks`` are the tensors to be marked as written, here and below."""
    if plan.chunks:
        work, _ = plan.work(plan.stream())
        plan.loaded.check(plan.library.dsf_copy(ctypes.byref(work)), "the copy kernel")
        written(marks)
    if plan.rest:
        reference.copy(*_rest(plan, dsts, srcs))


def move(plan: Plan, dst: int, src: int, *, blocks: int | None = None) -> None:
    """As `copy`, for a plan whose addresses are offsets from those given here, or absolute where 0 is given.

    ``blocks``: how many run it; the plan's unless told.
    """
    if plan.chunks:
        work = Work.from_buffer_copy(plan.work(plan.stream())[0])  # another thread may be using the plan
        work.dst_base, work.src_base = dst, src
        if blocks is not None:
            work.blocks = blocks
        plan.loaded.check(plan.library.dsf_copy(ctypes.byref(work)), "the copy kernel")


def gather_grads(
    plan: Plan,
    dsts: Tensors,
    srcs: Tensors,
    scale: float | torch.Tensor,
    accumulate: bool,
    found_inf: torch.Tensor | None,
    marks: Tensors,
) -> Stats:
    """``dsts[i] (+)= scale * srcs[i]``, and the statistics of what was written."""
    factor, scale_at = 1.0, 0
    if isinstance(scale, torch.Tensor):
        check_scalar("scale", scale, torch.float32, plan.device)
        scale_at = scale.data_ptr()
    else:
        factor = scale
    if found_inf is not None:
        check_scalar("found_inf", found_inf, torch.float32, plan.device)
    work, space = plan.work(plan.stream())
    stats = torch.empty(3, dtype=torch.float64, device=plan.device)
    flag = 0 if found_inf is None else found_inf.data_ptr()
    code = plan.library.dsf_gather_grads(
        ctypes.byref(work), factor, scale_at, accumulate, stats.data_ptr(), flag, space
    )
    plan.loaded.check(code, "the gather_grads kernel")
    written(marks if found_inf is None else [*marks, found_inf])
    if not plan.rest:
        return Stats(stats)
    some_dsts, some_srcs = _rest(plan, dsts, srcs)
    rest = reference.gather_grads(some_dsts, some_srcs, scale=scale, accumulate=accumulate, found_inf=found_inf)
    return _together(stats, rest)


def norm(plan: Plan, tensors: Tensors) -> Stats:
    """The statistics of the tensors together."""
    work, space = plan.work(plan.stream())
    stats = torch.empty(3, dtype=torch.float64, device=plan.device)
    plan.loaded.check(plan.library.dsf_norm(ctypes.byref(work), stats.data_ptr(), space), "the norm kernel")
    if not plan.rest:
        return Stats(stats)
    return _together(stats, reference.norm([tensors[i] for i in plan.rest]))


def publish(plan: Plan, dsts: Tensors, srcs: Tensors, seed: int | torch.Tensor, marks: Tensors) -> None:
    """``dsts[i] = srcs[i]``, rounded at random."""
    number, seed_at = 0, 0
    if isinstance(seed, torch.Tensor):
        check_scalar("seed", seed, torch.int64, plan.device)
        seed_at = seed.data_ptr()
    else:
        number = seed & ((1 << 64) - 1)
    if plan.chunks:
        work, _ = plan.work(plan.stream())
        code = plan.library.dsf_publish(ctypes.byref(work), number, seed_at)
        plan.loaded.check(code, "the publish kernel")
        written(marks)
    if plan.rest:
        reference.publish(dsts, srcs, seed=seed, only=plan.rest)


def _rest(plan: Plan, dsts: Tensors, srcs: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [dsts[i] for i in plan.rest], [srcs[i] for i in plan.rest]


def _together(stats: torch.Tensor, rest: Stats) -> Stats:
    other = rest.values.to(stats.device)
    total = stats + other
    total[1] = torch.maximum(stats[1], other[1])
    return Stats(total)


def written(tensors: Tensors) -> None:
    """Tell autograd that the tensors were written in place, so that it refuses what it saved of them before."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except (RuntimeError, TypeError, AttributeError):  # among them are inference tensors, or torch takes one at a time
        for tensor in tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)

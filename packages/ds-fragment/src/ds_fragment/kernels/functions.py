"""The operations on lists of tensors: check the arguments, then launch the CUDA kernel or run the torch reference.

[Note: plans] A CUDA launch needs a work table (`Plan`), which holds addresses. A plan is found again by the first
addresses of a call, and used only if every tensor has the address, size, dtype and contiguity it was made from. Nothing
here keeps a tensor alive. `torch.compile` calls the operations as the torch operators at the end of this file.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch

from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels import reference
from ds_fragment.kernels.choice import usable
from ds_fragment.kernels.library import loaded
from ds_fragment.kernels.plan import PLAIN, Op, Plan, pieces_of
from ds_fragment.kernels.reference import Stats, signed

Tensors = Sequence[torch.Tensor]

_LOW = (torch.bfloat16, torch.float16)
# What a plan is made from, column by column, since that is the fastest way to ask many tensors.
_COLUMNS: tuple[Any, ...] = (
    torch.Tensor.data_ptr,
    attrgetter("nbytes"),
    attrgetter("dtype"),
    torch.Tensor.is_contiguous,
)
_Columns = list[list[Any]]


def copy(dsts: Tensors, srcs: Tensors) -> None:
    """Copy ``srcs[i]`` into ``dsts[i]``, casting to its dtype (to nearest even) where they differ.

    Args:
        dsts: tensors of any dtype, shape, alignment and device, written in place; they do not overlap.
        srcs: as many tensors, each with as many elements.

    Raises:
        InvalidValueError: a number of tensors or elements does not match.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if torch.compiler.is_compiling():
        _copy_op(list(dsts), list(srcs))
        return
    plan = _plan("copy", dsts, srcs)
    if plan is None:
        reference.copy(dsts, srcs)
        return
    if plan.chunks:
        plan.launch()
        written(dsts)
    if plan.rest:
        reference.copy(_rest(plan, dsts), _rest(plan, srcs))


def gather_grads(
    dsts: Tensors,
    srcs: Tensors,
    *,
    scale: float | torch.Tensor = 1.0,
    accumulate: bool = False,
    found_inf: torch.Tensor | None = None,
) -> Stats:
    """Write low-precision gradients, scaled, into fp32 tensors, and return the statistics of what was written.

    Args:
        dsts: fp32, where the gradients go.
        srcs: the gradients, each with as many elements as its destination.
        scale: what to multiply by: a number, or an fp32 tensor of one element on the device.
        accumulate: add to the destinations instead of overwriting them.
        found_inf: fp32, one element on the device; set to 1 if anything that was written is not finite, and left
            alone otherwise.

    Raises:
        InvalidValueError: a number of tensors or elements, or a dtype, does not match.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if torch.compiler.is_compiling():
        number, at = (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)
        return Stats(_gather_grads_op(list(dsts), list(srcs), number, at, accumulate, found_inf))
    plan = _plan("gather_grads", dsts, srcs)
    if plan is None:
        return reference.gather_grads(dsts, srcs, scale=scale, accumulate=accumulate, found_inf=found_inf)
    factor, scale_at = _scalar("scale", scale, 1.0, torch.float32, plan.device)
    _, flag = _scalar("found_inf", found_inf, 0.0, torch.float32, plan.device)
    stats = torch.empty(3, dtype=torch.float64, device=plan.device)
    plan.launch(factor, scale_at, accumulate, stats.data_ptr(), flag)
    written(dsts if found_inf is None else [*dsts, found_inf])
    if not plan.rest:
        return Stats(stats)
    pairs = _rest(plan, dsts), _rest(plan, srcs)
    return _total(stats, reference.gather_grads(*pairs, scale=scale, accumulate=accumulate, found_inf=found_inf))


def norm(tensors: Tensors) -> Stats:
    """Compute the L2 norm, largest magnitude and number of non-finite elements of many tensors together.

    On a CUDA device nothing is copied, and the same tensors give the same bits every time.

    Args:
        tensors: of floating-point dtypes.

    Raises:
        InvalidValueError: a dtype is not floating-point.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if torch.compiler.is_compiling():
        return Stats(_norm_op(list(tensors)))
    plan = _plan("norm", tensors, tensors)
    if plan is None:
        return reference.norm(tensors)
    stats = torch.empty(3, dtype=torch.float64, device=plan.device)
    plan.launch(stats.data_ptr())
    return _total(stats, reference.norm(_rest(plan, tensors))) if plan.rest else Stats(stats)


def publish(dsts: Tensors, srcs: Tensors, *, seed: int | torch.Tensor | None = None) -> None:
    """Cast fp32 masters into low-precision weights.

    Args:
        dsts: the weights.
        srcs: the masters, each with as many elements; fp32 where they are to be rounded at random.
        seed: None rounds to nearest even. A number, or an int64 tensor of one element on the device, rounds to one of
            the two neighbours at random, so that the average is right; the bits depend on the seed, the position in
            the list and the position in the tensor alone.

    Raises:
        InvalidValueError: a number of tensors or elements, or a dtype, does not match.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if seed is None:
        copy(dsts, srcs)
        return
    if torch.compiler.is_compiling():
        number, at = (0, seed) if isinstance(seed, torch.Tensor) else (signed(seed), None)
        _publish_op(list(dsts), list(srcs), number, at)
        return
    plan = _plan("publish", dsts, srcs)
    if plan is None:
        reference.publish(dsts, srcs, seed=seed)
        return
    number, seed_at = _scalar("seed", seed, 0, torch.int64, plan.device)
    if plan.chunks:
        plan.launch(number & ((1 << 64) - 1), seed_at)
        written(dsts)
    if plan.rest:
        reference.publish(dsts, srcs, seed=seed, only=plan.rest)


def _plan(op: Op, dsts: Tensors, srcs: Tensors) -> Plan | None:
    """The checked work of a kernel, or None if torch is to do all of it."""
    ours = bool(dsts) and set(map(type, dsts)) <= PLAIN and set(map(type, srcs)) <= PLAIN
    if not ours or not usable(dsts[0].device):
        check(op, dsts, srcs)
        return None
    device = dsts[0].device
    try:
        to: _Columns = [list(map(column, dsts)) for column in _COLUMNS]
        of = to if srcs is dsts else [list(map(column, srcs)) for column in _COLUMNS]
    except RuntimeError:  # a tensor without memory, such as a sparse one or a wrapper of torch.func
        check(op, dsts, srcs)
        return None
    kept = _kept((op, device, len(dsts), to[0][0], *of[0][:1]))
    if kept and kept[0][:2] == (to, of):
        return kept[0][2]
    check(op, dsts, srcs)
    plan = Plan(loaded(), op, pieces_of(op, dsts, srcs, device), device)
    kept[:] = [(to, of, plan)]
    return plan


@functools.lru_cache(maxsize=64)
def _kept(key: Hashable) -> list[tuple[_Columns, _Columns, Plan]]:
    """The plan used last under a key, with what it was made from; empty at first. See [Note: plans]."""
    del key
    return []


def check(op: Op, dsts: Tensors, srcs: Tensors) -> None:
    """Raise `InvalidValueError` for the first pair that an operation does not accept, before anything is written."""
    if len(dsts) != len(srcs):
        raise InvalidValueError(f"there are {len(dsts)} dsts for {len(srcs)} srcs, expected one for each")
    if op == "copy" and list(map(torch.Tensor.numel, dsts)) == list(map(torch.Tensor.numel, srcs)):
        return
    for i, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        if dst.numel() != src.numel():
            raise InvalidValueError(
                f"dsts[{i}] has {dst.numel()} elements and srcs[{i}] {src.numel()}, expected as many"
            )
        if op != "copy" and not src.dtype.is_floating_point:
            raise InvalidValueError(f"srcs[{i}] has dtype {src.dtype}, expected a floating-point one")
        if op == "gather_grads" and dst.dtype != torch.float32:
            raise InvalidValueError(
                f"dsts[{i}] has dtype {dst.dtype}, expected torch.float32: gradients add up in fp32"
            )
        if op == "publish" and dst.dtype != src.dtype and (src.dtype != torch.float32 or dst.dtype not in _LOW):
            raise InvalidValueError(
                f"dsts[{i}] has dtype {dst.dtype} and srcs[{i}] {src.dtype}: stochastic rounding goes from "
                "torch.float32 to torch.bfloat16 or torch.float16"
            )


def _scalar(name: str, value: Any, default: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    """A number and an address as a kernel takes them: the value and 0, or the default and where the tensor lies."""
    if not isinstance(value, torch.Tensor):
        return (default if value is None else value), 0
    if value.numel() != 1 or value.dtype != dtype or value.device != device:
        raise InvalidValueError(
            f"{name} is a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}, expected one element "
            f"of {dtype} on {device}"
        )
    return default, value.data_ptr()


def _rest(plan: Plan, tensors: Tensors) -> list[torch.Tensor]:
    return [tensors[i] for i in plan.rest]


def _total(stats: torch.Tensor, rest: Stats) -> Stats:
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


def _operator(schema: str, writes: tuple[str, ...], run: Any, fake: Any) -> Any:
    """A torch operator of the package's name space; ``fake`` gives the shape of its result."""
    name = schema.partition("(")[0]
    op: Any = torch.library.custom_op(f"ds_fragment::{name}", run, mutates_args=writes, schema=schema[len(name) :])
    op.register_fake(fake)
    return op


def _three(tensors: list[torch.Tensor], *_: object) -> torch.Tensor:
    return torch.empty(3, dtype=torch.float64, device=tensors[0].device if tensors else "cpu")


_copy_op = _operator("copy(Tensor(a!)[] dsts, Tensor[] srcs) -> ()", ("dsts",), copy, lambda *_: None)
_gather_grads_op = _operator(
    "gather_grads(Tensor(a!)[] dsts, Tensor[] srcs, float scale, Tensor? scale_at, bool accumulate, "
    "Tensor(b!)? found_inf) -> Tensor",
    ("dsts", "found_inf"),
    lambda dsts, srcs, scale, at, accumulate, found_inf: (
        gather_grads(dsts, srcs, scale=scale if at is None else at, accumulate=accumulate, found_inf=found_inf).values
    ),
    _three,
)
_norm_op = _operator("norm(Tensor[] tensors) -> Tensor", (), lambda tensors: norm(tensors).values, _three)
_publish_op = _operator(
    "publish(Tensor(a!)[] dsts, Tensor[] srcs, int seed, Tensor? seed_at) -> ()",
    ("dsts",),
    lambda dsts, srcs, seed, at: publish(dsts, srcs, seed=seed if at is None else at),
    lambda *_: None,
)

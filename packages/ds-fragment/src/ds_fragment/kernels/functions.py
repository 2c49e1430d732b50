"""The operations as functions of lists of tensors; what was planned for a list is found again by its addresses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from threading import Lock

import torch

from ds_fragment.kernels import cuda, ops, reference
from ds_fragment.kernels.check import check
from ds_fragment.kernels.choice import usable
from ds_fragment.kernels.library import loaded
from ds_fragment.kernels.philox import signed
from ds_fragment.kernels.plan import Columns, Op, Plan, pieces_of
from ds_fragment.kernels.stats import Stats

_PLAIN = {torch.Tensor, torch.nn.Parameter}


class _Plans:
    """The plans used last, each with what it was made from: it is good for exactly that."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._plans: OrderedDict[Hashable, tuple[Columns, Columns, Plan]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, dsts: Columns, srcs: Columns) -> Plan | None:
        with self._lock:
            found = self._plans.get(key)
            if found is None or found[0] != dsts or found[1] != srcs:
                return None
            self._plans.move_to_end(key)
            return found[2]

    def put(self, key: Hashable, dsts: Columns, srcs: Columns, plan: Plan) -> None:
        with self._lock:
            self._plans[key] = (dsts, srcs, plan)
            self._plans.move_to_end(key)
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)


_plans = _Plans(most=64)


def _plan(op: Op, dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor], blocks: int | None = None) -> Plan | None:
    """What the kernel has to do, or None if torch is to do it."""
    ours = bool(dsts) and set(map(type, dsts)) <= _PLAIN and set(map(type, srcs)) <= _PLAIN
    if not ours or not usable(dsts[0].device):
        check(op, dsts, srcs)
        return None
    device = dsts[0].device
    try:
        to = Columns.of(dsts)
        of = to if srcs is dsts else Columns.of(srcs)
    except RuntimeError:  # a tensor without memory, such as a sparse one or a wrapper of torch.func
        check(op, dsts, srcs)
        return None
    key = (op, blocks, device, len(dsts), to.addresses[0], *of.addresses[:1])
    plan = _plans.get(key, to, of)
    if plan is None:
        check(op, dsts, srcs)
        plan = Plan(loaded(), op, pieces_of(op, dsts, srcs, device), device, blocks)
        _plans.put(key, to, of, plan)
    return plan


def copy(dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor], *, blocks: int | None = None) -> None:
    """Copy ``srcs[i]`` into ``dsts[i]``, casting to its dtype (to nearest even) where they differ.

    Args:
        dsts: tensors of any dtype, shape, alignment and device, written in place; they do not overlap.
        srcs: as many tensors, each with as many elements.
        blocks: how many of a GPU's run it, so that others get their share of the memory; as many as are fastest unless
            told.

    Raises:
        InvalidValueError: a number of tensors or elements does not match.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if torch.compiler.is_compiling():
        ops.copy(list(dsts), list(srcs))
        return
    plan = _plan("copy", dsts, srcs, blocks)
    reference.copy(dsts, srcs) if plan is None else cuda.copy(plan, dsts, srcs, dsts)


def gather_grads(
    dsts: Sequence[torch.Tensor],
    srcs: Sequence[torch.Tensor],
    *,
    scale: float | torch.Tensor = 1.0,
    accumulate: bool = False,
    found_inf: torch.Tensor | None = None,
) -> Stats:
    """Bring low-precision gradients into fp32, scaled, and say what their norm is and whether they are finite.

    Args:
        dsts: fp32, where the gradients go.
        srcs: the gradients, each with as many elements as its destination.
        scale: what to multiply by: a number, or an fp32 tensor of one element on the device.
        accumulate: add to the destinations instead of overwriting them.
        found_inf: fp32, one element on the device; set to 1 if anything that was written is not finite, and left
            alone otherwise.

    Returns:
        Statistics of what was written.

    Raises:
        InvalidValueError: a number of tensors or elements, or a dtype, does not match.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if torch.compiler.is_compiling():
        by, at = (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)
        return Stats(ops.gather_grads(list(dsts), list(srcs), by, at, accumulate, found_inf))
    plan = _plan("gather_grads", dsts, srcs)
    if plan is None:
        return reference.gather_grads(dsts, srcs, scale=scale, accumulate=accumulate, found_inf=found_inf)
    return cuda.gather_grads(plan, dsts, srcs, scale, accumulate, found_inf, dsts)


def norm(tensors: Sequence[torch.Tensor]) -> Stats:
    """The L2 norm, largest magnitude and number of non-finite elements of many tensors together.

    On a CUDA device nothing is copied, and the same tensors give the same bits every time.

    Args:
        tensors: of floating-point dtypes.

    Raises:
        InvalidValueError: a dtype is not floating-point.
        KernelError: the CUDA kernels are asked for and cannot run.
    """
    if torch.compiler.is_compiling():
        return Stats(ops.norm(list(tensors)))
    plan = _plan("norm", tensors, tensors)
    return reference.norm(tensors) if plan is None else cuda.norm(plan, tensors)


def publish(
    dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor], *, seed: int | torch.Tensor | None = None
) -> None:
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
        ops.publish(list(dsts), list(srcs), number, at)
        return
    plan = _plan("publish", dsts, srcs)
    if plan is None:
        reference.publish(dsts, srcs, seed=seed)
    else:
        cuda.publish(plan, dsts, srcs, seed, dsts)

"""Pairs of tensors whose work is prepared once and done many times.

[Note: moved tensors] A table holds addresses. Before every use the address and size of every tensor are compared with
those that it was made from; where one has changed (an optimizer was reloaded, ``param.data`` was assigned) it is made
anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch

from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels import cuda, functions, reference
from ds_fragment.kernels.check import check
from ds_fragment.kernels.choice import usable
from ds_fragment.kernels.library import loaded
from ds_fragment.kernels.plan import Op, Plan, pieces_of
from ds_fragment.kernels.stats import Stats

_address = torch.Tensor.data_ptr
_nbytes = attrgetter("nbytes")


class Fragments:
    """Pairs of tensors, the sources read and the destinations written, any number of them in one launch each time.

    Args:
        srcs: tensors of any dtypes, shapes and alignment; or one tensor, (n,), contiguous, that holds what belongs to
            the dsts one after the other, such as a flat partition.
        dsts: for everything but `norm`, as many, each with as many elements as its source; or one tensor likewise.
            They do not overlap each other or the sources.

    Raises:
        InvalidValueError: a number of tensors or elements does not match.

    >>> weights = [torch.randn(3, 5), torch.randn(7)]
    >>> master = torch.empty(22)
    >>> fragments = Fragments(weights, master)
    >>> fragments.copy_()
    >>> torch.equal(master[:15], weights[0].view(-1))
    True
    """

    def __init__(
        self, srcs: Sequence[torch.Tensor] | torch.Tensor, dsts: Sequence[torch.Tensor] | torch.Tensor | None = None
    ) -> None:
        self._given: tuple[list[torch.Tensor], list[torch.Tensor]] = (_listed(srcs), _listed(dsts))
        self._flat = (isinstance(srcs, torch.Tensor) and dsts is not None, isinstance(dsts, torch.Tensor))
        if all(self._flat):
            raise InvalidValueError("srcs and dsts are one tensor each: pass a list for the one that says the sizes")
        self._writes = dsts is not None
        self._plans: dict[Op, Plan] = {}
        self._seen: list[tuple[list[int], list[int]]] = [([], []), ([], [])]  # addresses and sizes, by side
        self._cut()
        check("copy", self.dsts if self._writes else self.srcs, self.srcs)

    def _cut(self) -> None:
        srcs, dsts = self._given
        self.srcs = _slices("srcs", srcs[0], dsts) if self._flat[0] else srcs
        self.dsts = _slices("dsts", dsts[0], srcs) if self._flat[1] else dsts

    def _still(self, side: int) -> bool:
        """Whether the tensors of a side are where they were."""
        given, seen = self._given[side], self._seen[side]
        addresses, sizes = list(map(_address, given)), list(map(_nbytes, given))
        if addresses == seen[0] and sizes == seen[1]:
            return True
        self._seen[side] = (addresses, sizes)
        return False

    def _plan(self, op: Op) -> Plan | None:
        """The work, made anew if anything has moved; None if torch is to do it."""
        if op != "norm" and not self._writes:
            raise InvalidValueError("these Fragments were made without dsts: there is nothing to write to")
        where = self._given[0] or self._given[1]
        kernels = bool(where) and usable(where[0].device)
        # Both sides are looked at, so that both are known from now on.
        moved = [side for side in ((0,) if op == "norm" else (0, 1)) if not self._still(side)]
        if moved:
            self._plans.clear()
            self._cut()
        dsts = self.srcs if op == "norm" else self.dsts
        if not kernels:
            check(op, dsts, self.srcs)
            return None
        if op not in self._plans:
            check(op, dsts, self.srcs)
            device = dsts[0].device
            self._plans[op] = Plan(loaded(), op, pieces_of(op, dsts, self.srcs, device), device)
        return self._plans[op]

    def copy_(self) -> None:
        """Copy the sources into the destinations, cast to nearest even; where dtypes agree, bit for bit."""
        if torch.compiler.is_compiling():
            functions.copy(self.dsts, self.srcs)
            return
        plan = self._plan("copy")
        if plan is None:
            reference.copy(self.dsts, self.srcs)
        else:
            cuda.copy(plan, self.dsts, self.srcs, self._given[1])

    def gather_grads_(
        self,
        *,
        scale: float | torch.Tensor = 1.0,
        accumulate: bool = False,
        found_inf: torch.Tensor | None = None,
    ) -> Stats:
        """Write the sources times a scale into the fp32 destinations, or add them there. See `gather_grads`."""
        if torch.compiler.is_compiling():
            dsts, srcs = self.dsts, self.srcs
            return functions.gather_grads(dsts, srcs, scale=scale, accumulate=accumulate, found_inf=found_inf)
        plan = self._plan("gather_grads")
        dsts, srcs = self.dsts, self.srcs  # made anew if they have moved
        if plan is None:
            return reference.gather_grads(dsts, srcs, scale=scale, accumulate=accumulate, found_inf=found_inf)
        return cuda.gather_grads(plan, dsts, srcs, scale, accumulate, found_inf, self._given[1])

    def norm(self) -> Stats:
        """The statistics of the sources together. See `norm`."""
        if torch.compiler.is_compiling():
            return functions.norm(self.srcs)
        plan = self._plan("norm")
        return reference.norm(self.srcs) if plan is None else cuda.norm(plan, self.srcs)

    def publish_(self, *, seed: int | torch.Tensor | None = None) -> None:
        """Cast the fp32 sources into the destinations, rounded at random if there is a seed. See `publish`."""
        if seed is None:
            self.copy_()
            return
        if torch.compiler.is_compiling():
            functions.publish(self.dsts, self.srcs, seed=seed)
            return
        plan = self._plan("publish")
        if plan is None:
            reference.publish(self.dsts, self.srcs, seed=seed)
        else:
            cuda.publish(plan, self.dsts, self.srcs, seed, self._given[1])

    def __len__(self) -> int:
        return len(self.srcs)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.srcs)

    def __repr__(self) -> str:
        return f"Fragments({len(self.srcs)} tensors, {sum(src.numel() for src in self.srcs)} elements)"


def _listed(tensors: Sequence[torch.Tensor] | torch.Tensor | None) -> list[torch.Tensor]:
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _slices(name: str, flat: torch.Tensor, others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What belongs to each of the others, one after the other: views."""
    sizes = [other.numel() for other in others]
    if flat.dim() != 1 or not flat.is_contiguous() or flat.numel() != sum(sizes):
        raise InvalidValueError(
            f"{name} is one tensor of shape {tuple(flat.shape)} and strides {flat.stride()}, expected a contiguous one "
            f"of shape ({sum(sizes)},) for {len(sizes)} tensors of that many elements together"
        )
    return list(flat.detach().split_with_sizes(sizes))

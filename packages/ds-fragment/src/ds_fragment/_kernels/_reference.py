"""The kernels in plain torch: they run everywhere, and are the oracle of any faster ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy(dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor]) -> None:
    """Copy ``srcs[i]`` into ``dsts[i]``, casting to its dtype (to nearest even) where they differ.

    Args:
        dsts: tensors of any dtype and device, written in place; they do not overlap.
        srcs: as many tensors, of the same shapes.
    """
    if dsts:
        torch._foreach_copy_(list(dsts), list(srcs))

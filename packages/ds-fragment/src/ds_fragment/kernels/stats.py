"""What the reductions answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of many tensors together, on their device; reading a number from them waits for it.

    Attributes:
        values: fp64, (3,): the sum of squares, the largest magnitude, the number of elements that are not finite. The
            first and third add up over ranks. Where an element is infinite or NaN, so are the first two. Squares are
            taken in fp32: the square of a magnitude over 1.8e19 is infinite.
    """

    values: torch.Tensor

    @property
    def sum_squares(self) -> torch.Tensor:
        """fp64, ()."""
        return self.values[0]

    @property
    def norm(self) -> torch.Tensor:
        """The L2 norm: fp64, ()."""
        return self.values[0].sqrt()

    @property
    def largest(self) -> torch.Tensor:
        """The largest magnitude, the maximum norm: fp64, ()."""
        return self.values[1]

    @property
    def nonfinite(self) -> torch.Tensor:
        """How many elements are infinite or NaN: fp64, (), a whole number."""
        return self.values[2]

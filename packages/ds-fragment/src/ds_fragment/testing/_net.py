"""The model that every engine trains, its data, its optimizer, and what is written into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

USED = ("up.weight", "up.bias", "down.weight", "down.bias", "gain")
UNUSED = "unused"
ONE = "down.weight"  # what operations on one parameter are tried with: (3, 8), which two ranks cut unevenly
STATE = "exp_avg"

LR, BETAS, EPS = 0.1, (0.9, 0.99), 0.1  # so large an eps makes a step a smooth function of the gradient


class Net(nn.Module):
    """Two layers that tensor parallelism can cut, odd sizes, and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0, -1.5]))
        self.unused = nn.Parameter(torch.arange(1.0, 6.0) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, 5) to (batch, 3)."""
        out: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return out * self.gain


def net(seed: int) -> Net:
    """The model, fp32 and the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def adam(params: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that the oracle computes with; ``params`` is whatever the engine has to be optimized."""
    return torch.optim.Adam(params, lr=LR, betas=BETAS, eps=EPS)


def batch(turn: int, part: int) -> torch.Tensor:
    """What the part-th data-parallel rank is given in the turn-th forward pass: fp32, (4, 5)."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1000 * turn + part))


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    """The loss of one data-parallel rank."""
    return outputs.square().mean()


def pattern(name: str, shape: torch.Size) -> torch.Tensor:
    """What is written into a parameter: fp32, with so few bits that bf16 holds it too, and no two names alike."""
    numbers = torch.arange(shape.numel()) * 5 + len(name)
    return ((numbers % 13).float() / 16 - 0.34375).view(shape)


def local_pattern(piece: torch.Tensor) -> torch.Tensor:
    """What is written into a piece: fp32, exact in bf16, each number once, and none that training would leave there."""
    return (0.0625 + torch.arange(piece.numel()) / 512).view(piece.shape)

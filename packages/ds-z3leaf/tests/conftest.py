"""A model with mixture-of-experts blocks, small enough to read."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)


class WideExpert(Expert):
    pass


class MoeBlock(nn.Module):
    def __init__(self, expert: type[Expert] = Expert) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(expert() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class SparseBlock(MoeBlock):
    """A subclass that nobody names."""


class Layer(nn.Module):
    def __init__(self, block: type[MoeBlock]) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.mlp = block()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(SparseBlock if i == 11 else MoeBlock) for i in range(12))
        self.head = nn.Linear(4, 2)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def kinds() -> dict[str, type[nn.Module]]:
    """The classes above: tests cannot import them from here."""
    return {kind.__name__: kind for kind in (Expert, WideExpert, MoeBlock, SparseBlock, Layer, Net)}

"""Models that DeepSpeed has something special for: experts, leaves, sequence and tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, EXPERTS, HEADS = 4, 4, 2


class Mixture(nn.Module):
    """A layer, DeepSpeed's mixture of experts, and a layer."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.first = nn.Linear(WIDTH, WIDTH)
        self.mixture = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=EXPERTS, ep_size=ep_size, k=1)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, WIDTH) -> scalar"""
        mixed, loss, _ = self.mixture(torch.tanh(self.first(x)))
        out: torch.Tensor = self.last(mixed).float().square().mean() + 0.01 * loss
        return out


class Chosen(nn.Module):
    """Sends every row to the expert that its data choose; an expert that no row goes to is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, WIDTH) -> (batch, WIDTH)"""
        best, choice = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.experts[index](x[rows]) * best[rows].unsqueeze(-1))
        return out


class Sparse(nn.Module):
    """Two of them, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Chosen(), Chosen()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, WIDTH) -> scalar"""
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return x.float().square().mean()


class Attention(nn.Module):
    """Causal self-attention of which each rank of the sequence group has a part of the sequence."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        from deepspeed.sequence.layer import DistributedAttention

        self.qkv = nn.Linear(WIDTH, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, WIDTH)
        self.attention = DistributedAttention(_attend, group, scatter_idx=2, gather_idx=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, tokens of this rank, WIDTH) -> scalar"""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)  # (1, tokens, HEADS, WIDTH)
        mixed = self.attention(q.contiguous(), k.contiguous(), v.contiguous(), 0)
        return self.out(mixed.flatten(2)).float().square().mean()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
    return mixed.transpose(1, 2).contiguous()


class Mlp(nn.Module):
    """Two layers that tensor parallelism cuts, the first by columns and the second by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, WIDTH) -> scalar"""
        return self.down_proj(torch.tanh(self.up_proj(x))).float().square().mean()


def rows(step: int, rank: int, *shape: int) -> torch.Tensor:
    """A rank's batch, fp32."""
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))

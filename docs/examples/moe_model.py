"""A small byte-level transformer whose feed-forward layers are mixtures of experts; nothing here knows of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256  # bytes


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        half = dim // heads // 2
        angles = torch.outer(torch.arange(context).float(), 10000.0 ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context, half)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From and to (batch, time, dim)."""
        batch, time, dim = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, dim))

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Expert(nn.Module):
    """A two-layer perceptron."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From and to (tokens, dim)."""
        return self.down(F.silu(self.up(x)))


class MixtureOfExperts(nn.Module):
    """Each token goes to the expert that the router likes best: which experts run differs from rank to rank."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From and to (tokens, dim)."""
        chances = self.router(x).float().softmax(dim=-1)  # (tokens, experts)
        weight, choice = chances.max(dim=-1)
        shares = F.one_hot(choice, len(self.experts)).float().mean(dim=0)
        self.imbalance = len(self.experts) * (shares * chances.mean(dim=0)).sum()  # 1 where all are used alike
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (choice == number).nonzero().squeeze(-1)
            if len(mine):
                y = y.index_add(0, mine, expert(x[mine]) * weight[mine].unsqueeze(-1).to(x.dtype))
        return y


class Block(nn.Module):
    """Attention, then the experts, each behind a norm and beside a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, experts: int, context: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, context)
        self.moe_norm = nn.LayerNorm(dim)
        self.moe = MixtureOfExperts(dim, hidden, experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From and to (batch, time, dim)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x).flatten(0, 1)).view_as(x)


class ByteTransformer(nn.Module):
    """Predicts the next byte."""

    def __init__(
        self, dim: int = 192, layers: int = 4, heads: int = 4, hidden: int = 384, experts: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, experts, context) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats a byte over (batch, time + 1) bytes; a scalar, fp32.

        While training, a little is added for experts that are not used alike.
        """
        x = self.embedding(text[:, :-1])
        for block in self.blocks:
            x = block(x)
        scores = self.head(self.norm(x)).float()
        loss = F.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())
        if self.training:
            loss = loss + 0.01 * torch.stack([block.moe.imbalance - 1 for block in self.blocks]).mean()
        return loss

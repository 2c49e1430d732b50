"""What the tests share: awkward models, ways to compare bits, and oracles that know nothing of ds-fragment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that NaN equals NaN and -0.0 does not equal 0.0."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    if tensor.dtype.is_complex:
        return bits(torch.view_as_real(tensor.detach().resolve_conj()))
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def assert_same(one: torch.Tensor, other: torch.Tensor, about: object = "") -> None:
    assert one.shape == other.shape, (about, one.shape, other.shape)
    assert one.dtype == other.dtype, (about, one.dtype, other.dtype)
    assert torch.equal(bits(one), bits(other)), (about, one, other)


class Ragged(nn.Module):
    """Parameters that no cut meets evenly: tiny, long, 0-dimensional, empty, frozen, tied, unused.

    FSDP2 takes neither 0-dimensional nor empty ones.
    """

    def __init__(self, *, fsdp2: bool = False) -> None:
        super().__init__()
        self.tiny = nn.Parameter(torch.randn(1))
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.empty = nn.Parameter(torch.randn(int(fsdp2), 4))
        self.scalar = nn.Parameter(torch.randn(1 if fsdp2 else ()))
        self.long = nn.Parameter(torch.randn(7, 11))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(6))
        self.tied = self.weight
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 5) -> (batch,)"""
        hidden = x @ self.weight + self.bias * self.tiny
        return (hidden * self.scalar).sum(dim=1) + (x[:, :1] * self.long.flatten()).sum(dim=1) + self.empty.sum()


def ragged(dtype: torch.dtype = torch.float32, seed: int = 0, *, fsdp2: bool = False) -> Ragged:
    torch.manual_seed(seed)
    return Ragged(fsdp2=fsdp2).to(dtype)


def whole_numbers(model: nn.Module, seed: int = 0) -> None:
    """Fill the parameters with small integers, in which fp32 and bf16 arithmetic is exact."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randint(-8, 9, param.shape, generator=generator))


def set_gradients(params: Iterable[torch.Tensor], seed: int, *, whole: bool = True) -> list[torch.Tensor]:
    """Give every parameter a gradient made of small integers (or normal ones); returns clones."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for param in params:
        grad = (
            torch.randint(-16, 17, param.shape, generator=generator)
            if whole
            else torch.randn(param.shape, generator=generator)
        ).to(param.dtype)
        param.grad = grad.clone()
        made.append(grad)
    return made


def slices_of_flat(flats: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """What parameters of those shapes are, when the ranks' flat partitions are put one after the other."""
    whole, position, found = torch.cat(list(flats)), 0, []
    for shape in shapes:
        found.append(whole[position : position + shape.numel()].reshape(shape))
        position += shape.numel()
    return found


def from_every_rank(mine: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """Everybody's tensor, by pickling: it shares nothing with the exchange."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine.detach().clone(), group=group)
    return found


def raised(call: Callable[[], object]) -> tuple[str, str] | None:
    """The type and text of what a call raises; None if it returns."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def snapshot(*things: object) -> list[torch.Tensor]:
    """Clones of every tensor in modules, optimizers, tensors and partitions, to compare before and after."""
    found: list[torch.Tensor] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            for param in thing.parameters():
                found.append(_local(param))
                found.extend([] if param.grad is None else [_local(param.grad)])
        elif isinstance(thing, torch.optim.Optimizer):
            for group in thing.param_groups:
                for param in group["params"]:
                    found.append(_local(param))
                    found.extend([] if param.grad is None else [_local(param.grad)])
            for state in thing.state.values():
                found.extend(_local(entry) for entry in state.values() if isinstance(entry, torch.Tensor))
        elif isinstance(thing, torch.Tensor):
            found.append(_local(thing))
        else:
            raise TypeError(type(thing))
    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().clone()


def unchanged(before: list[torch.Tensor], *things: object) -> bool:
    after = snapshot(*things)
    return len(before) == len(after) and all(same_bits(one, other) for one, other in zip(before, after, strict=True))


def awkward_values(numel: int) -> torch.Tensor:
    """fp32 with -0.0, NaN payloads of both signs, infinities and subnormals, over and over."""
    patterns = torch.tensor(
        [
            -0x80000000,  # -0.0
            0x00000000,
            0x7FC00001,  # quiet NaN with a payload
            0x7F812345,  # signalling NaN with a payload
            -0x00400001,  # negative NaN (0xFFBFFFFF)
            0x7F800000,  # inf
            -0x00800000,  # -inf (0xFF800000)
            0x00000001,  # the smallest subnormal
            -0x7FFFFFFF,  # its negative (0x80000001)
            0x007FFFFF,  # the largest subnormal
            0x7F7FFFFF,  # the largest finite
            0x3F800001,  # the least above one
        ],
        dtype=torch.int32,
    )
    return patterns.repeat(-(-numel // len(patterns)) or 1)[:numel].view(torch.float32)

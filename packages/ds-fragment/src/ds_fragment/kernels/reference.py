"""The operations in plain torch: they run on every device, and are the oracle of the CUDA kernels.

Casts are torch's own, to nearest even. Statistics are the same quantities as the kernels', added in another order.
Rounding at random takes its bits from Philox, which computes them from a seed and a position alone.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32 with 10 rounds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensors = Sequence[torch.Tensor]

_HALF = (torch.bfloat16, torch.float16)
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # finite, as fp32 bits


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
        """L2: fp64, ()."""
        return self.values[0].sqrt()

    @property
    def largest(self) -> torch.Tensor:
        """The largest magnitude, the maximum norm: fp64, ()."""
        return self.values[1]

    @property
    def nonfinite(self) -> torch.Tensor:
        """How many elements are infinite or NaN: fp64, (), a whole number."""
        return self.values[2]


def copy(dsts: Tensors, srcs: Tensors) -> None:
    """``dsts[i] = srcs[i]``, cast; where the dtypes agree, bit for bit."""
    pairs = [_same_bits(dst, src) for dst, src in zip(dsts, srcs, strict=True) if dst.numel()]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([dst for dst, _ in pairs], [src for _, src in pairs])


def _same_bits(dst: torch.Tensor, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair, of one shape. On a GPU torch's foreach copy changes NaN payloads of half precision, integers' never."""
    if src.shape != dst.shape:
        src = src.reshape(dst.shape)
    if dst.dtype == src.dtype and dst.dtype in _HALF and not (dst.is_neg() or src.is_neg()):
        return dst.detach().view(torch.int16), src.detach().view(torch.int16)
    return dst, src


def gather_grads(
    dsts: Tensors,
    srcs: Tensors,
    *,
    scale: float | torch.Tensor = 1.0,
    accumulate: bool = False,
    found_inf: torch.Tensor | None = None,
) -> Stats:
    """``dsts[i] (+)= scale * srcs[i]`` in fp32, and the statistics of what was written."""
    with torch.no_grad():
        if not accumulate:
            copy(dsts, srcs)
        for dst, src in zip(dsts, srcs, strict=True):
            by = scale.to(dst.device) if isinstance(scale, torch.Tensor) else scale
            if accumulate:
                dst += src.detach().reshape(dst.shape).to(torch.float32) * by
            else:
                dst *= by
        stats = norm(dsts, found_inf.device if not dsts and found_inf is not None else None)
        if found_inf is not None:
            found_inf.masked_fill_((stats.nonfinite > 0).to(found_inf.device), 1.0)
    return stats


def norm(tensors: Tensors, device: torch.device | None = None) -> Stats:
    """The statistics of the tensors together."""
    device = tensors[0].device if tensors else device or torch.device("cpu")
    values = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.numel():
                continue
            x = tensor.detach()
            norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
            values[0] += norm.square().to(device)
            largest: torch.Tensor = torch.linalg.vector_norm(x, float("inf"))
            values[1] = torch.maximum(values[1], largest.to(device, torch.float64))
            values[2] += (x - x).count_nonzero().to(device)  # 0 where x is finite, NaN elsewhere
    return Stats(values)


def publish(dsts: Tensors, srcs: Tensors, *, seed: int | torch.Tensor, only: Sequence[int] | None = None) -> None:
    """``dsts[i] = srcs[i]``, rounded at random; of all pairs, or some."""
    with torch.no_grad():
        for piece in range(len(dsts)) if only is None else only:
            dst, src = dsts[piece], srcs[piece]
            if dst.dtype == src.dtype:
                dst.copy_(src.reshape(dst.shape))
            elif dst.numel():
                random = words(seed, piece, src.numel(), src.device)
                dst.copy_(dither(src.detach().reshape(-1), random, dst.dtype).view(dst.shape))


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Four random words for each counter (int64, (n, 4)) with a key (int64, (2,)); every number is a 32-bit word."""
    x = [word.clone() for word in counter.unbind(1)]
    keys = list(key.unbind(0))
    for _ in range(10):
        products = [multiplier * x[2 * i] for i, multiplier in enumerate(_MULTIPLIERS)]  # wraps, and the bits are right
        high = [(product >> 32) & _MASK for product in products]
        x = [high[1] ^ x[1] ^ keys[0], products[1] & _MASK, high[0] ^ x[3] ^ keys[1], products[0] & _MASK]
        keys = [(k + step) & _MASK for k, step in zip(keys, _WEYL, strict=True)]
    return torch.stack(x, 1)


def words(seed: int | torch.Tensor, piece: int, numel: int, device: torch.device) -> torch.Tensor:
    """The random word of each element of a piece: int64, (numel,)."""
    whole = seed.to(torch.int64).reshape(()) if isinstance(seed, torch.Tensor) else torch.tensor(signed(seed))
    key = torch.stack([whole & _MASK, (whole >> 32) & _MASK]).to(device)
    block = torch.arange(-(-numel // 4), dtype=torch.int64, device=device)
    counter = torch.stack([block & _MASK, block >> 32, torch.full_like(block, piece), torch.zeros_like(block)], 1)
    return philox(counter, key).reshape(-1)[:numel]


def signed(seed: int) -> int:
    """The int64 with the lowest 64 bits of a number."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def dither(values: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round fp32 values at random to one of their two neighbours in bf16 or fp16, the nearer the likelier.

    ``random`` is a 32-bit word for each, as int64. What lies beyond the dtype's largest finite number, and what is not
    finite, is rounded to nearest.
    """
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _MASK
    magnitude = bits & 0x7FFFFFFF
    drop = 16 if dtype == torch.bfloat16 else 13
    low = (1 << drop) - 1
    moved = (bits + (random & low)) & (_MASK ^ low)
    if dtype == torch.float16:  # below 2^-14 its numbers are 2^-24 apart
        tiny = magnitude < 0x38800000
        scaled = torch.where(tiny, _float(magnitude) * 16777216.0, 0.0)
        whole = scaled.floor()
        up = (scaled - whole > (random >> 8).to(torch.float32) * 2.0**-24).to(torch.float32)
        steps = ((whole + up) * 2.0**-24).view(torch.int32).to(torch.int64) | (bits & 0x80000000)
        moved = torch.where(tiny, steps, moved)
    return _float(torch.where(magnitude > _LARGEST[dtype], bits, moved)).to(dtype)


def _float(bits: torch.Tensor) -> torch.Tensor:
    return torch.where(bits >> 31 == 1, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)

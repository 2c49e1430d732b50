"""Random bits that depend on a seed and a place alone, and rounding with them, in plain torch.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32 with 10 rounds).
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # finite, as fp32 bits


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Four random words for each counter.

    Args:
        counter: int64, (n, 4), each a 32-bit word.
        key: int64, (2,), each a 32-bit word.

    Returns:
        int64, (n, 4), each a 32-bit word.
    """
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
    """Round fp32 values at random to one of their two neighbours in a dtype, the nearer the likelier.

    What lies beyond the dtype's largest finite number, and what is not finite, is rounded to nearest.

    Args:
        values: fp32, (n,).
        random: int64, (n,), a random 32-bit word for each.
        dtype: bf16 or fp16.

    Returns:
        A tensor of the dtype, (n,).
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

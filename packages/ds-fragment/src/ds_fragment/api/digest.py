"""A number for the bits of a tensor, to tell whether they have changed."""

from __future__ import annotations

import torch

_AT_ONCE = 1 << 20  # words of 8 bytes that are mixed at a time
_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15, odd: it sets each place far from all others


def digest(piece: torch.Tensor) -> int:
    """64 bits that differ, but for one chance in 2**64, where the bits or their order do. Any dtype, any device.

    Each word of 8 bytes is mixed with its place before they are summed, so that small changes do not cancel.

    >>> digest(torch.tensor([1.0, 2.0])) == digest(torch.tensor([2.0, 1.0]))
    False
    >>> digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0]))
    False
    """
    data = piece.detach().contiguous().view(-1).view(torch.uint8)  # 1-D
    whole = data.numel() // 8 * 8
    words = data[:whole] if data.storage_offset() % 8 == 0 else data[:whole].clone()
    tail = torch.nn.functional.pad(data[whole:], (0, 8 - (data.numel() - whole)))
    total = torch.tensor(data.numel(), device=piece.device)
    place = 1
    for part in (*torch.split(words.view(torch.int64), _AT_ONCE), tail.view(torch.int64)):
        places = torch.arange(place, place + len(part), device=piece.device)
        total += _mixed(places.mul_(_STEP).add_(part)).sum()
        place += len(part)
    return int(total)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit integers each of whose output bits depends on all input bits, in place.

    Source: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    words ^= (words >> 30) & 0x3FFFFFFFF  # a logical shift
    words *= -4658895280553007687  # 0xBF58476D1CE4E5B9
    words ^= (words >> 27) & 0x1FFFFFFFFF
    words *= -7723592293110705685  # 0x94D049BB133111EB
    words ^= (words >> 31) & 0x1FFFFFFFF
    return words

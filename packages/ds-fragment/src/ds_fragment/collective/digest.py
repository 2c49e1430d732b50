"""Digests of tensors, to tell whether ranks hold the same."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence
from itertools import accumulate

import torch

_SUM_AT_ONCE = 1 << 20  # elements, 8 bytes each while they are summed


def digest(value: torch.Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """A number for the bits that a value has in a dtype, and their order: the same on ranks with the same value.

    Args:
        value: on any device.
        dtype: what it is cast to.
        device: the parameter's: a CPU takes a CRC-32 of the bytes, a GPU sums words weighted by position.
    """
    flat = value.detach().resolve_neg().reshape(-1)
    if device.type == "cpu":
        total = 0
        for part in [flat] if flat.dtype == dtype and not flat.is_cuda else torch.split(flat, _SUM_AT_ONCE):
            there = part.to("cpu", dtype)
            if there.numel():
                total = zlib.crc32((ctypes.c_char * there.nbytes).from_address(there.data_ptr()), total)
        return total
    weighted = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in torch.split(flat, _SUM_AT_ONCE):
        words = _words(part.to(dtype))
        weighted = weighted * 31 + (words * torch.arange(1, len(words) + 1, device=words.device)).sum()
    return int(weighted)


def checksums(pieces: Sequence[torch.Tensor | None]) -> list[int]:
    """A sum over the bits of each, whatever their order, which is several times faster; 0 for None.

    It tells what was computed from different data apart. Small pieces of a kind are summed together.
    """
    sums, totals = [0] * len(pieces), list[tuple[list[int], torch.Tensor]]()
    with torch.no_grad():
        for items in _batches(pieces):
            flats = [_flat(piece) for item in items if (piece := pieces[item]) is not None]
            words = _words(torch.cat(flats) if len(flats) > 1 else flats[0])
            if len(flats) == 1:
                totals.append((items, words.sum(dtype=torch.int64).view(1)))
                continue
            width = words.numel() // sum(map(torch.Tensor.numel, flats))
            ends = list(accumulate(width * flat.numel() for flat in flats))
            running = words.cumsum(0, dtype=torch.int64)[torch.tensor(ends, device=words.device) - 1]
            totals.append((items, running.diff(prepend=running.new_zeros(1))))
    for items, found in totals:  # the host waits for a device at the first of them
        for item, total in zip(items, found.tolist(), strict=True):
            sums[item] = int(total)
    return sums


def _batches(pieces: Sequence[torch.Tensor | None]) -> list[list[int]]:
    """Pieces of one dtype and device that are summed together, without those that are empty."""
    batches: list[list[int]] = []
    open_batches: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for item, piece in enumerate(pieces):
        if piece is None or not piece.numel():
            continue
        kind = (piece.dtype, piece.device)
        batch, filled = open_batches.get(kind, ([], _SUM_AT_ONCE))
        if filled + piece.numel() > _SUM_AT_ONCE:
            batch, filled = [], 0
            batches.append(batch)
        batch.append(item)
        open_batches[kind] = (batch, filled + piece.numel())
    return batches


def _flat(piece: torch.Tensor) -> torch.Tensor:
    return (piece if piece.layout == torch.strided else piece.to_dense()).reshape(-1)


def _words(whole: torch.Tensor) -> torch.Tensor:
    """The bits as integers of at most 32 bits, 1-D, so that products with positions have room in 64."""
    return whole.view(-1).view({1: torch.uint8, 2: torch.int16}.get(whole.dtype.itemsize, torch.int32))

"""Digests of tensors, to tell whether ranks hold the same."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence
from itertools import accumulate

import torch

_SUM_AT_ONCE = 1 << 20  # elements, 8 bytes each while they are summed
_AT_ONCE = 1 << 26  # elements that are cast at a time
_COLUMNS = 1024


def digests(values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> list[int]:
    """A number of 63 bits for the bits that each value has in a dtype, and for their order.

    Args:
        values: of any shapes, on any device.
        dtypes: what they are cast to.
        device: the parameters'; all ranks give the same kind. On a CPU it is a CRC-32 and an Adler-32 of the bytes. On
            a GPU the words of 8 bytes are a table of `_COLUMNS` columns, of which all rows and columns are summed, and
            the sums mixed with their positions: two passes over the memory, and the host waits once for all values.
    """
    pairs = list(zip(values, dtypes, strict=True))
    if device.type == "cpu":
        return [_checked_bytes(value, dtype) for value, dtype in pairs]
    found = [_sum_of_sums(value, dtype) for value, dtype in pairs]
    return [int(total) >> 1 for total in torch.stack(found).tolist()] if found else []


def _checked_bytes(value: torch.Tensor, dtype: torch.dtype) -> int:
    crc, adler = 0, 1
    flat = value.detach().resolve_neg().reshape(-1)
    for part in [flat] if flat.dtype == dtype and not flat.is_cuda else torch.split(flat, _AT_ONCE):
        there = part.to("cpu", dtype)
        if there.numel():
            data = (ctypes.c_char * there.nbytes).from_address(there.data_ptr())
            crc, adler = zlib.crc32(data, crc), zlib.adler32(data, adler)
    return (adler & 0x7FFFFFFF) << 32 | crc


def _sum_of_sums(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64, ()."""
    flat = value.detach().resolve_neg().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, part in enumerate(torch.split(flat, _AT_ONCE)):
        data = part.to(dtype).contiguous().view(torch.uint8)
        width = 8 * _COLUMNS
        if data.numel() % width or data.storage_offset() % 8:
            data = torch.nn.functional.pad(data, (0, -data.numel() % width))
        table = data.view(torch.int64).view(-1, _COLUMNS)
        for salt, sums in enumerate((table.sum(0), table.sum(1))):
            positions = torch.arange(len(sums), device=flat.device).add_((2 * number + salt) << 40)
            total = total + _mixed(_mixed(positions).add_(sums)).sum()
    return total


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit integers each of whose output bits depends on all input bits, in place.

    Source: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    words += -7046029254386353131  # 0x9E3779B97F4A7C15
    words ^= (words >> 30) & 0x3FFFFFFFF  # a logical shift
    words *= -4658895280553007687  # 0xBF58476D1CE4E5B9
    words ^= (words >> 27) & 0x1FFFFFFFFF
    words *= -7723592293110705685  # 0x94D049BB133111EB
    words ^= (words >> 31) & 0x1FFFFFFFF
    return words


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

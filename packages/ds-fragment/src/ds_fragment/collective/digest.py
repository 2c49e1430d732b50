"""Digests of tensors, to tell whether ranks hold the same."""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from ds_fragment.layout import batches

_SUM_AT_ONCE = 1 << 20  # elements, 8 bytes each while they are summed
_AT_ONCE = 1 << 26  # elements that are cast at a time
_COLUMNS = 1024


def digests(values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> list[int]:
    """A number of 63 bits for the bits that each value has in a dtype, and for their order.

    Args:
        values: of any shapes, on any device.
        dtypes: what they are cast to.
        device: the parameters'; all ranks give the same kind. On a CPU it is a CRC-32 and an Adler-32 of the bytes. On
            a GPU the words of 4 bytes are a table of `_COLUMNS` columns, and the sums of its rows and columns are added
            with weights: two passes over the memory, and the host waits once for all values.
    """
    pairs = list(zip(values, dtypes, strict=True))
    if device.type == "cpu":
        return [_of_bytes([value], [dtype]) for value, dtype in pairs]
    return _on_host([_of_table([value], [dtype]) for value, dtype in pairs])


def digest_of_all(values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> int:
    """As `digests`, one number for all values together; on a GPU several times as fast for many small ones."""
    if device.type == "cpu":
        return _of_bytes(values, dtypes)
    totals = [
        _of_table([values[at] for at in batch], [dtypes[at] for at in batch])
        for batch in batches([value.numel() for value in values], _AT_ONCE)
    ]
    return hash(tuple(_on_host(totals))) >> 1


def _of_bytes(values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> int:
    crc, adler = 0, 1
    for value, dtype in zip(values, dtypes, strict=True):
        flat = value.detach().resolve_neg().reshape(-1)
        for part in [flat] if flat.dtype == dtype and not flat.is_cuda else torch.split(flat, _AT_ONCE):
            there = part.to("cpu", dtype)
            if there.numel():
                data = (ctypes.c_char * there.nbytes).from_address(there.data_ptr())
                crc, adler = zlib.crc32(data, crc), zlib.adler32(data, adler)
    return (adler & 0x7FFFFFFF) << 32 | crc


def _on_host(totals: Sequence[torch.Tensor]) -> list[int]:
    return [int(total) >> 1 for total in torch.stack(list(totals)).tolist()] if totals else []


def _of_table(values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    """Of all values together: int64, ()."""
    device = values[0].device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, data in enumerate(_parts(values, dtypes)):
        width = 4 * _COLUMNS
        if data.numel() % width or data.storage_offset() % 4:
            data = torch.nn.functional.pad(data, (0, -data.numel() % width))
        table = data.view(torch.int32).view(-1, _COLUMNS)  # whose sums do not overflow 64 bits
        for salt, sums in enumerate((table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64))):
            total = total + (sums * _weights(len(sums), 2 * number + salt, device)).sum()
    return total


def _parts(values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> Iterator[torch.Tensor]:
    """The bytes of one value part by part, or of several values one after the other."""
    flats = [value.detach().resolve_neg().reshape(-1) for value in values]
    if len(flats) == 1:
        for part in torch.split(flats[0], _AT_ONCE):
            yield part.to(dtypes[0]).contiguous().view(torch.uint8)
    else:
        pairs = zip(flats, dtypes, strict=True)
        yield torch.cat([flat.to(dtype).contiguous().view(torch.uint8) for flat, dtype in pairs])


@functools.lru_cache(maxsize=64)
def _weights(count: int, salt: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit integers that look random, so that no change of one sum is lost.

    Source: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    words = torch.arange(count, device=device).add_(salt << 40)
    words += -7046029254386353131  # 0x9E3779B97F4A7C15
    words ^= (words >> 30) & 0x3FFFFFFFF  # a logical shift
    words *= -4658895280553007687  # 0xBF58476D1CE4E5B9
    words ^= (words >> 27) & 0x1FFFFFFFFF
    words *= -7723592293110705685  # 0x94D049BB133111EB
    words ^= (words >> 31) & 0x1FFFFFFFF
    return words | 1


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

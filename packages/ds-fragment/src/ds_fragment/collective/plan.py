"""What travels with what, and how: buckets of items, and for each bucket one transfer a process group.

[Note: buckets] Items travel in the caller's order, as many at a time as fit ``bucket_bytes``. The next bucket is in
flight while the caller works on this one, so that two buckets are in memory. An item that is packed counts twice: it
is in the staging buffer and in the whole.

[Note: ways] Shards travel in one of three ways. *In place*: large items whose shards are intervals of the flattened
whole are received where they belong; equal shards by an all-gather, others by a broadcast from each rank that holds
one. *Packed*: a rank's other shards stand one after the other in its chunk of the staging buffer. Chunks of about the
same length are all-gathered, padded to the longest; others are broadcast, so that no rank receives padding instead of
data. Every rank computes all offsets from the layouts. Bytes travel as they are: -0.0, NaN payloads and subnormals
arrive bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist

from ds_fragment import _collectives
from ds_fragment._collectives import device_for
from ds_fragment.collective.status import MARK_BYTES
from ds_fragment.layout import batches
from ds_fragment.sharding import Sharding

# Bytes of a bucket: about what moves in the time that it takes to start some collectives.
BUCKET_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Bytes of the whole from which packing and unpacking take longer than a collective of its own.
IN_PLACE = {"cpu": 256 << 10, "cuda": 32 << 20}
_PADDED = 1 << 20  # bytes of all chunks below which padding takes no longer than broadcasts do
_ALIGN = 16  # bytes; a multiple of every dtype's size


def bucket_bytes_for(shardings: Sequence[Sharding]) -> int:
    """Bytes of a bucket unless the caller says; on a GPU at least two of the largest item fit two buckets."""
    if all(sharding.device.type == "cpu" for sharding in shardings):
        return BUCKET_BYTES["cpu"]
    return max([BUCKET_BYTES["cuda"], *(sharding.nbytes for sharding in shardings if not sharding.alone)])


Kind = Literal["even", "other", "single"]


@dataclass(slots=True)
class Section:
    """Shards of one dtype and kind in the chunks, one after the other; those of one shape beside each other.

    Attributes:
        dtype: of the shards.
        items: in the order in which their shards stand.
        kind: ``"even"`` where every rank's shards are equal intervals in rank order, ``"single"`` where each item is
            the whole of one rank.
        sent: by rank, the elements of each item.
        begins: by rank, the byte of its chunk where the section begins.
    """

    dtype: torch.dtype
    items: list[int]
    kind: Kind
    sent: list[list[int]]
    begins: list[int]

    def of(self, chunk: torch.Tensor, rank: int) -> torch.Tensor:
        """The section of a rank's chunk: 1-D, of the section's dtype."""
        nbytes = sum(self.sent[rank]) * self.dtype.itemsize
        return chunk.narrow(0, self.begins[rank], nbytes).view(self.dtype)


class Transfer:
    """How some items travel between the ranks of one group.

    Args:
        items: positions in ``shardings``, of the same group and device.
        shardings: of all items.

    Attributes:
        gathered: items that travel in place by an all-gather.
        broadcast: items that travel in place by broadcasts.
        sections: of the packed items.
        padded: whether the chunks of the packed items are all-gathered, each with a mark at its head.
        lengths: bytes of each rank's chunk.
        begins: where each rank's chunk begins in the staging buffer, and where the last one ends.
    """

    def __init__(self, items: Sequence[int], shardings: Sequence[Sharding]) -> None:
        group = shardings[items[0]].group
        assert group is not None
        self.group, self.items, self.shardings = group, items, shardings
        self.size, self.rank = group.size(), group.rank()
        self.ranks = dist.get_process_group_ranks(group)
        self.home = shardings[items[0]].device
        self.device = device_for(group, self.home)
        _collectives.leave_gently(self.device.type)
        large = [item for item in items if self._is_in_place(shardings[item])]
        self.gathered = [item for item in large if shardings[item].even]
        self.broadcast = [item for item in large if not shardings[item].even]
        self.sections = self._sections([item for item in items if item not in set(large)])
        self._cut()

    def _is_in_place(self, sharding: Sharding) -> bool:
        large = sharding.nbytes >= IN_PLACE.get(self.home.type, 0)
        return large and self.device == self.home and bool(sharding.spans)

    def _sections(self, items: Sequence[int]) -> list[Section]:
        found: dict[tuple[Kind, torch.dtype], list[int]] = {}
        for item in items:
            found.setdefault((_kind_of(self.shardings[item]), self.shardings[item].dtype), []).append(item)
        sections = []
        for (kind, dtype), chosen in sorted(found.items(), key=lambda entry: entry[0][0]):  # even ones first
            chosen.sort(key=lambda item: self.shardings[item].shape)
            sent = [list(column) for column in zip(*(self.shardings[item].sent for item in chosen), strict=True)]
            sections.append(Section(dtype, chosen, kind, sent, []))
        return sections

    def _cut(self) -> None:
        """Where the sections stand in the chunks, and the chunks in the staging buffer."""
        bodies = []
        for rank in range(self.size):
            sizes = [_aligned(sum(section.sent[rank]) * section.dtype.itemsize) for section in self.sections]
            bodies.append(sum(sizes))
            for section, begin in zip(self.sections, accumulate(sizes, initial=0), strict=False):
                section.begins.append(begin)
        longest = max(bodies)
        all_padded = longest * self.size
        self.padded = 0 < all_padded <= max(_PADDED, sum(bodies) * 5 // 4)
        if self.padded:
            bodies = [MARK_BYTES + longest] * self.size
            for section in self.sections:
                section.begins = [MARK_BYTES + begin for begin in section.begins]
        self.lengths = bodies
        self.begins = list(accumulate(bodies, initial=0))

    def chunk(self, staging: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's chunk of the staging buffer."""
        return staging.narrow(0, self.begins[rank], self.lengths[rank])


@dataclass(slots=True)
class Bucket:
    """Items that travel at once.

    Attributes:
        items: in the caller's order.
        alone: those of them that this rank holds whole.
        transfers: of the others, one for each group and device.
    """

    items: list[int]
    alone: list[int]
    transfers: list[Transfer]


class Plan:
    """The buckets of one list of shardings; good for as long as the shardings are."""

    def __init__(self, shardings: Sequence[Sharding], bucket_bytes: int) -> None:
        self.shardings, self.bucket_bytes = shardings, bucket_bytes
        self.buckets = [self._bucket(items) for items in _filled(shardings, bucket_bytes)]
        self.groups = {transfer.group for bucket in self.buckets for transfer in bucket.transfers}

    def _bucket(self, items: list[int]) -> Bucket:
        by_group: dict[tuple[dist.ProcessGroup, torch.device], list[int]] = {}
        alone = []
        for item in items:
            sharding = self.shardings[item]
            if sharding.alone or sharding.group is None:
                alone.append(item)
            else:
                by_group.setdefault((sharding.group, sharding.device), []).append(item)
        return Bucket(items, alone, [Transfer(chosen, self.shardings) for chosen in by_group.values()])


def _filled(shardings: Sequence[Sharding], bucket_bytes: int) -> list[list[int]]:
    """Items by bucket: as many as fit; at least one."""
    # An item that a rank holds whole may have another dtype on another rank, and all ranks must cut alike.
    together = any(not sharding.alone for sharding in shardings)
    taken = []
    for sharding in shardings:
        if sharding.alone:
            taken.append(4 * sharding.shape.numel() if together else sharding.nbytes)
        else:
            packed = sharding.nbytes < IN_PLACE.get(sharding.device.type, 0) or not sharding.spans
            taken.append(sharding.nbytes * (2 if packed else 1))
    return batches(taken, bucket_bytes)


def _kind_of(sharding: Sharding) -> Kind:
    if sharding.even:
        return "even"
    return "single" if max(sharding.sent) == sharding.shape.numel() > 0 else "other"


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN

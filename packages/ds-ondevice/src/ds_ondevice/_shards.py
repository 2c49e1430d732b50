"""Which part of a tensor this rank holds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ds_ondevice._plan import is_dtensor
from ds_ondevice._safetensors import Region, Span

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def region_of(tensor: torch.Tensor) -> Region:
    """The part of a tensor that this rank holds: all of a plain one, the shard of a DTensor."""
    if not is_dtensor(tensor):
        return tuple(((0, length),) for length in tensor.shape)
    if tensor.device_mesh.get_coordinate() is None:  # this rank is not in the mesh
        return tuple(() for _ in tensor.shape)
    region = []
    for dim, length in enumerate(tensor.shape):
        spans: tuple[Span, ...] = ((0, length),)
        for parts, index, factor in _cuts_of(tensor, dim):
            spans = held(spans, parts, index, factor)
        region.append(spans)
    return tuple(region)


def _cuts_of(tensor: DTensor, dim: int) -> list[tuple[int, int, int]]:
    """How a dimension is cut, one mesh axis after the other: parts, this rank's, and the factor as `held` has it."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    cuts = [_cut_of(placement) for placement in tensor.placements]
    return [
        (mesh.size(axis), coordinate[axis], cut[1])
        for axis, cut in enumerate(cuts)
        if cut is not None and cut[0] == dim
    ]


def _cut_of(placement: object) -> tuple[int, int] | None:
    """The dimension that a placement cuts, -1 for none, and the factor as `held` has it; None for unknown ones."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if type(placement) is Replicate:
        return -1, 1
    if type(placement) is _StridedShard:
        return placement.dim, int(placement.split_factor)
    return (placement.dim, 1) if type(placement) is Shard else None


@functools.cache
def is_nested(length: int, cuts: tuple[tuple[int, int], ...]) -> bool:
    """Whether the parts of a dimension are those of FSDP2, which cuts what tensor parallel has cut already.

    DTensor describes that with the axes the other way round and a strided shard. Of some uneven lengths the two give
    other parts: which a rank has then depends on who made the tensor.

    Args:
        length: of the dimension.
        cuts: for each mesh axis that cuts it the number of parts, and the factor as `held` has it.
    """
    if all(factor == 1 for _, factor in cuts):
        return True
    for indices in itertools.product(*(range(parts) for parts, _ in cuts)):
        described: tuple[Span, ...] = ((0, length),)
        nested = described
        for (parts, factor), index in zip(cuts, indices, strict=True):
            described = held(described, parts, index, factor)
        for (parts, _), index in reversed(list(zip(cuts, indices, strict=True))):
            nested = held(nested, parts, index)
        if described != nested:
            return False
    return True


def held(spans: tuple[Span, ...], parts: int, index: int, factor: int = 1) -> tuple[Span, ...]:
    """What is left of a dimension when it is cut once more.

    It is cut as ``torch.chunk`` does: into pieces of one size, rounded up, the last ones smaller or empty. DTensor's
    strided shard (tensor parallel below FSDP2) first cuts into ``factor`` blocks and takes a piece of each.

    Args:
        spans: what there is, one behind the other.
        parts: into how many pieces.
        index: which piece is kept.
        factor: how many blocks.
    """
    length = _length(spans)
    kept: list[Span] = []
    for block in range(factor):
        start, stop = _chunk(length, factor, block)
        first, last = _chunk(stop - start, parts, index)
        for piece in _cut(spans, start + first, start + last):
            if kept and kept[-1][1] == piece[0]:
                kept[-1] = (kept[-1][0], piece[1])
            else:
                kept.append(piece)
    return tuple(kept)


def _length(spans: tuple[Span, ...]) -> int:
    return sum(stop - start for start, stop in spans)


def _chunk(length: int, parts: int, index: int) -> Span:
    size = -(-length // parts)
    return min(length, size * index), min(length, size * (index + 1))


def _cut(spans: tuple[Span, ...], start: int, stop: int) -> Iterator[Span]:
    at = 0  # where the span begins among those before it
    for first, last in spans:
        left, right = max(start, at), min(stop, at + last - first)
        if left < right:
            yield first + left - at, first + right - at
        at += last - first


def unsupported_placement(tensor: DTensor) -> str:
    """Why it is not known which part of a DTensor is this rank's; "" if it is."""
    placements = tensor.placements
    unknown = [placement for placement in placements if _cut_of(placement) is None]
    if unknown:
        return f"it is placed as {placements}, and {unknown[0]} is not supported"
    for dim, length in enumerate(tensor.shape):
        cuts = tuple((parts, factor) for parts, _, factor in _cuts_of(tensor, dim))
        if not is_nested(length, cuts):
            return f"its placements {placements} do not say which of the {length} indices of dimension {dim} a rank has"
    local = tuple(tensor._local_tensor.shape)
    shape = tuple(_length(spans) for spans in region_of(tensor))
    if shape != local and (all(shape) or all(local)):
        return f"this rank's part has shape {local}, and not {shape} as its placements {placements} say"
    return ""

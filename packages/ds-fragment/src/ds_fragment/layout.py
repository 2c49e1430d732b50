"""Which rank holds which part of a parameter: pure interval arithmetic, without torch and without communication.

[Note: layout] A parameter is cut over the ranks of one process group. Each rank holds one *fragment* of it, or none:
a box of the parameter, given by where it begins and how far it extends along each dimension. For engines that
flatten, the box is an interval of the flattened parameter; for a DTensor it is a block of rows (FSDP), of columns
(tensor parallel), or of both. A *layout* is the fragments of one parameter on all ranks, by group rank, over the
`shape` they are boxes of. Where several ranks hold the same fragment, all but one of them are *copies*: they are
written like the others, and send nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box: ``offset`` and ``size``, in elements, along each dimension of the layout's shape."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements the box has."""
        return prod(self.size)


@dataclass(frozen=True, slots=True)
class Layout:
    """The fragments of one parameter on all ranks of a group.

    Attributes:
        shape: what the fragments are boxes of: the parameter's shape, or ``(numel,)`` where the engine flattens it.
        fragments: by group rank; None where the rank holds nothing.
        copies: the group ranks whose fragment another rank sends.
    """

    shape: tuple[int, ...]
    fragments: tuple[Fragment | None, ...]
    copies: frozenset[int] = frozenset()

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def held(self, rank: int) -> int:
        """Elements that a group rank holds."""
        fragment = self.fragments[rank]
        return 0 if fragment is None else fragment.numel

    def sent(self, rank: int) -> int:
        """Elements that a group rank contributes to the whole."""
        return 0 if rank in self.copies else self.held(rank)

    def spans(self) -> tuple[tuple[int, int, int], ...] | None:
        """(rank, start, elements) in the flattened whole of each fragment that is sent; None unless all are intervals.

        A fragment is an interval where it extends over all but the first dimension.
        """
        found = []
        row = prod(self.shape[1:])
        for rank, fragment in enumerate(self.fragments):
            if fragment is None or rank in self.copies:
                continue
            if not self.shape or fragment.size[1:] != self.shape[1:]:
                return None
            found.append((rank, fragment.offset[0] * row, fragment.numel))
        return tuple(found)


def overlap(start: int, numel: int, other_start: int, other_numel: int) -> tuple[int, int]:
    """The (start, numel) that two intervals have in common; numel is 0 where they do not meet.

    >>> overlap(0, 10, 6, 10)
    (6, 4)
    """
    first = max(start, other_start)
    return first, max(0, min(start + numel, other_start + other_numel) - first)


def interval(start: int, numel: int) -> Fragment | None:
    """The fragment of a flattened parameter, or None for an empty one."""
    return Fragment((start,), (numel,)) if numel > 0 else None


def batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Positions in order, as many at a time as have sizes that add up to the limit; at least one.

    >>> batches([3, 4, 9, 1, 1], limit=8)
    [[0, 1], [2], [3, 4]]
    """
    found: list[list[int]] = []
    filled = 0
    for at, size in enumerate(sizes):
        if not found or filled + size > limit:
            found.append([])
            filled = 0
        found[-1].append(at)
        filled += size
    return found


def whole(shape: Sequence[int]) -> Layout:
    """One rank that holds everything."""
    return Layout(tuple(shape), (Fragment((0,) * len(shape), tuple(shape)),))


def flat_layout(start: int, numel: int, partition_size: int, world_size: int) -> Layout:
    """A parameter at ``start`` of a flat buffer that is cut into equal partitions, one a rank.

    >>> [f and (f.offset[0], f.numel) for f in flat_layout(6, 8, partition_size=5, world_size=3).fragments]
    [None, (0, 4), (4, 4)]
    """
    fragments = []
    for rank in range(world_size):
        first, count = overlap(start, numel, rank * partition_size, partition_size)
        fragments.append(interval(first - start, count))
    return Layout((numel,), tuple(fragments))


def even_layout(numel: int, world_size: int) -> Layout:
    """A parameter cut alone, in equal parts rounded up, the last ones short or empty (ZeRO-3)."""
    return flat_layout(0, numel, -(-numel // world_size), world_size)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """The (start, length) of part ``index`` as `torch.chunk` cuts: parts rounded up, the last ones short or empty.

    >>> [chunk(5, 4, i) for i in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    step = -(-size // parts)
    start = min(index * step, size)
    return start, min(start + step, size) - start


def mesh_layout(
    shape: Sequence[int], mesh_shape: Sequence[int], dims: Sequence[int | None], order: Sequence[int] | None = None
) -> Layout:
    """A tensor sharded over a device mesh.

    Args:
        shape: the whole tensor's.
        mesh_shape: ranks along each mesh axis; group ranks run over the mesh in row-major order.
        dims: for each mesh axis, the tensor dimension that it shards, or None where it replicates.
        order: in which order the mesh axes cut; left to right unless told.

    Returns:
        The layout over all ranks of the mesh; all but the first along each replicating axis are copies.
    """
    axes = range(len(mesh_shape)) if order is None else order
    fragments: list[Fragment | None] = []
    copies: set[int] = set()
    for rank in range(prod(mesh_shape)):
        coordinate = unravel(rank, mesh_shape)
        offset, size = [0] * len(shape), list(shape)
        for axis in axes:
            dim = dims[axis]
            if dim is None:
                continue
            start, size[dim] = chunk(size[dim], mesh_shape[axis], coordinate[axis])
            offset[dim] += start
        if any(dims[axis] is None and coordinate[axis] > 0 for axis in axes):
            copies.add(rank)
        fragments.append(Fragment(tuple(offset), tuple(size)) if prod(size) else None)
    return Layout(tuple(shape), tuple(fragments), frozenset(copies))


def unravel(rank: int, mesh_shape: Sequence[int]) -> tuple[int, ...]:
    """The coordinate of a rank in a row-major mesh.

    >>> unravel(5, (2, 3))
    (1, 2)
    """
    coordinate = []
    for size in reversed(mesh_shape):
        rank, index = divmod(rank, size)
        coordinate.append(index)
    return tuple(reversed(coordinate))

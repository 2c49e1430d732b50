"""Interval arithmetic against sets of element numbers, and against torch's own cuts."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from ds_fragment.layout import (
    Fragment,
    Layout,
    chunk,
    even_layout,
    flat_layout,
    interval,
    mesh_layout,
    overlap,
    unravel,
    whole,
)


def elements(layout: Layout, rank: int) -> list[int]:
    """The flat element numbers that a rank holds, by walking the box."""
    fragment = layout.fragments[rank]
    if fragment is None:
        return []
    numbers = torch.arange(layout.numel).view(layout.shape)
    for dim, (offset, size) in enumerate(zip(fragment.offset, fragment.size, strict=True)):
        numbers = numbers.index_select(dim, torch.arange(offset, offset + size))
    return numbers.flatten().tolist()


def test_overlap_is_the_intersection_of_two_sets() -> None:
    for start, numel, other, length in itertools.product(range(6), repeat=4):
        first, count = overlap(start, numel, other, length)
        both = sorted(set(range(start, start + numel)) & set(range(other, other + length)))
        assert count == len(both)
        assert not both or list(range(first, first + count)) == both


def test_an_empty_interval_is_no_fragment() -> None:
    assert interval(3, 0) is None
    assert interval(3, 2) == Fragment((3,), (2,))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_flat_layout_is_the_part_of_each_equal_slice(world_size: int) -> None:
    for start, numel, size in itertools.product(range(12), range(12), range(1, 9)):
        layout = flat_layout(start, numel, size, world_size)
        assert layout.shape == (numel,)
        assert len(layout.fragments) == world_size
        for rank in range(world_size):
            slice_of_rank = set(range(rank * size, (rank + 1) * size))
            mine = sorted(number - start for number in set(range(start, start + numel)) & slice_of_rank)
            assert elements(layout, rank) == mine
            assert layout.held(rank) == layout.sent(rank) == len(mine)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 7, 8, 9, 31])
def test_even_layout_covers_everything_once_in_order(numel: int, world_size: int) -> None:
    layout = even_layout(numel, world_size)
    assert [number for rank in range(world_size) for number in elements(layout, rank)] == list(range(numel))
    assert max(layout.held(rank) for rank in range(world_size)) == -(-numel // world_size)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 9])
def test_chunk_cuts_as_torch_chunk_does(parts: int) -> None:
    for size in range(1, 24):
        theirs = [part.tolist() for part in torch.arange(size).chunk(parts)]
        ours = [list(range(start, start + count)) for start, count in (chunk(size, parts, i) for i in range(parts))]
        assert [part for part in ours if part] == theirs
        assert ours[len(theirs) :] == [[]] * (parts - len(theirs))


def test_chunk_of_nothing_is_nothing() -> None:
    assert [chunk(0, 3, i) for i in range(3)] == [(0, 0)] * 3


@pytest.mark.parametrize("mesh_shape", [(1,), (4,), (2, 3), (3, 1, 2), (2, 2, 2)])
def test_unravel_counts_in_row_major_order(mesh_shape: tuple[int, ...]) -> None:
    coordinates = list(itertools.product(*map(range, mesh_shape)))
    assert [unravel(rank, mesh_shape) for rank in range(len(coordinates))] == coordinates


def nested_chunks(
    numbers: torch.Tensor, mesh_shape: tuple[int, ...], dims: list[int | None], order: list[int], at: tuple[int, ...]
) -> torch.Tensor:
    """What one rank is left with when torch cuts axis after axis."""
    for axis in order:
        dim = dims[axis]
        if dim is not None:
            parts = numbers.chunk(mesh_shape[axis], dim)
            numbers = parts[at[axis]] if at[axis] < len(parts) else numbers.narrow(dim, 0, 0)
    return numbers


def test_mesh_layout_is_torch_chunk_axis_after_axis() -> None:
    random.seed(0)
    for _ in range(400):
        shape = tuple(random.randint(0, 6) for _ in range(random.randint(1, 3)))
        mesh_shape = tuple(random.randint(1, 3) for _ in range(random.randint(1, 3)))
        dims = [random.choice([None, *range(len(shape))]) for _ in mesh_shape]
        order = list(range(len(mesh_shape)))
        random.shuffle(order)
        if any(size == 0 for size in shape):
            continue  # torch.chunk of an empty dimension gives one part; nobody holds anything then
        layout = mesh_layout(shape, mesh_shape, dims, order)
        numbers = torch.arange(layout.numel).view(shape)
        for rank, at in enumerate(itertools.product(*map(range, mesh_shape))):
            expected = nested_chunks(numbers, mesh_shape, dims, order, at)
            assert elements(layout, rank) == expected.flatten().tolist()
            first_copy = all(index == 0 for index, dim in zip(at, dims, strict=True) if dim is None)
            assert (rank in layout.copies) == (not first_copy)
        sent = [n for rank in range(len(layout.fragments)) if layout.sent(rank) for n in elements(layout, rank)]
        assert sorted(sent) == list(range(layout.numel))


def test_mesh_layout_of_an_empty_tensor_is_held_by_nobody() -> None:
    assert mesh_layout((0, 4), (2,), [0]).fragments == (None, None)


def test_the_axes_cut_from_left_to_right_unless_told() -> None:
    shape, mesh, dims = (8,), (2, 2), [0, 0]
    assert [elements(mesh_layout(shape, mesh, dims), rank) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    swapped = mesh_layout(shape, mesh, dims, order=[1, 0])
    assert [elements(swapped, rank) for rank in range(4)] == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_whole_is_one_rank_with_everything() -> None:
    for shape in [(), (3,), (2, 5), (0, 4)]:
        layout = whole(shape)
        assert len(layout.fragments) == 1
        assert layout.held(0) == layout.sent(0) == layout.numel == torch.Size(shape).numel()


def test_a_copy_sends_nothing() -> None:
    everything = Fragment((0,), (4,))
    layout = Layout((4,), (everything, everything, None), frozenset({1}))
    assert [layout.held(rank) for rank in range(3)] == [4, 4, 0]
    assert [layout.sent(rank) for rank in range(3)] == [4, 0, 0]

"""Parts of chunks: how quantities are cut, and where pieces and wholes stand."""

from __future__ import annotations

import torch
from ds_fragment._layout import Fragment, Layout, even_layout, flat_layout, mesh_layout, whole
from ds_fragment._place import Place
from ds_fragment._sections import Room, Section, cut_of, stretches


def test_how_a_quantity_is_cut() -> None:
    assert cut_of(even_layout(8, 2)) == "even"
    assert cut_of(mesh_layout((4, 3), (2,), (0,))) == "even"
    assert cut_of(mesh_layout((5, 3), (2,), (0,))) == "runs"
    assert cut_of(even_layout(5, 4)) == "runs"  # the last rank holds nothing
    assert cut_of(Layout((4,), (Fragment((2,), (2,)), Fragment((0,), (2,))))) == "runs"  # not in rank order
    assert cut_of(flat_layout(2, 3, 8, 2)) == "single"
    assert cut_of(whole((3, 2))) == "single"
    assert cut_of(mesh_layout((3,), (2,), (None,))) == "single"  # all but the first are copies
    assert cut_of(mesh_layout((4, 4), (2,), (1,))) == "boxes"
    assert cut_of(even_layout(0, 2)) == "boxes"  # nothing is sent


def test_stretches_are_bytes_of_the_flattened_whole() -> None:
    assert stretches(mesh_layout((5, 3), (2,), (0,)), 4) == [(0, 0, 36), (1, 36, 24)]
    assert stretches(flat_layout(2, 3, 4, 3), 2) == [(0, 0, 4), (1, 4, 2)]
    assert stretches(mesh_layout((4, 4), (2,), (1,)), 4) is None


def test_pieces_stand_one_after_the_other() -> None:
    section = Section("runs", torch.int16, [7, 3, 5], [[2, 0, 3], [1, 4, 0]], [4, 0])
    chunk = torch.arange(20, dtype=torch.uint8)
    for rank, items, begin in ((0, [7, 5], 4), (1, [7, 3], 0)):
        parts = dict(section.parts(chunk, rank))
        assert list(parts) == items
        joined = torch.cat(list(parts.values()))
        assert torch.equal(joined.view(torch.uint8), chunk[begin : begin + section.nbytes(rank)])
    assert section.offsets(0) == [4, 8, 8]
    assert section.offsets(1) == [0, 2, 10]


def test_neighbours_of_one_shape_are_made_at_once_and_all_are_aligned() -> None:
    shapes = [(4, 2), (4, 2), (3,), (3,), (), (0, 5), (16,)]
    places = [
        Place(torch.Size(s), torch.float32, torch.device("cpu"), even_layout(torch.Size(s).numel(), 2), None)
        for s in shapes
    ]
    room = Room(range(len(places)), places, align=16)
    storage = torch.arange(float(room.numel))
    views = room.views(storage)
    assert [tuple(view.shape) for view in views] == shapes
    for start, view in zip(room.starts, views, strict=True):
        assert start % 4 == 0
        assert view.flatten().tolist() == [float(start + i) for i in range(view.numel())]
    assert len(room._runs) == 6

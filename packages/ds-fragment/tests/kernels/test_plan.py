"""Work tables, against the same arithmetic written out element by element."""

from __future__ import annotations

import random
import struct
from array import array

import pytest
import torch
from ds_fragment.kernels import KernelError, plan
from ds_fragment.kernels.library import Loaded
from ds_fragment.kernels.plan import SAME, Pieces, kind_of, pieces_of, table_of

BYTES = {0: 4, 1: 2, 2: 2, 15: 1}


def chunks_of(address: int, numel: int, element: int, vector: int, groups: int) -> int:
    """How many chunks a piece has, counted one vector at a time."""
    if numel == 0:
        return 0
    first = next(i for i in range(129) if i == numel or (address + i * element) % 128 == 0)
    vectors, at = 0, first
    while at + vector <= numel:
        vectors, at = vectors + 1, at + vector
    return max(1, -(-vectors // groups))


@pytest.mark.parametrize("op", ["copy", "gather_grads", "norm"])
def test_tables_list_pieces_and_the_piece_of_every_chunk(
    library: Loaded, monkeypatch: pytest.MonkeyPatch, op: plan.Op
) -> None:
    monkeypatch.setitem(plan.GROUPS, op, 7)
    rng = random.Random(op)
    for _ in range(60):
        rows = []
        for _ in range(rng.randrange(12)):
            kind = rng.choice([0x10, 0x01, 0x21, 0x00] if op == "copy" else [0x00, 0x01, 0x02])
            if op == "copy" and kind == 0:
                kind = SAME
            source, target = kind & 15, (kind & 15 if op == "norm" else kind >> 4)
            to, of = (rng.randrange(1 << 40) * BYTES[side] for side in (target, source))
            rows.append((to, of, rng.choice([0, rng.randrange(40), rng.randrange(900)]), kind, source, target))
        columns = [array("Q", column) for column in zip(*[row[:3] for row in rows], strict=True)] or [array("Q")] * 3
        pieces = Pieces(*columns, bytes(row[3] for row in rows), [])
        chunks, table = table_of(library.library, op, pieces)
        raw = bytes(table.tolist())
        expected: list[int] = []
        for i, (to, of, numel, kind, source, target) in enumerate(rows):
            assert struct.unpack_from("<QQQII", raw, 32 * i) == (to, of, numel, len(expected), kind)
            vector = 16 // max(BYTES[source], BYTES[target])
            address, element = (of, BYTES[source]) if op == "norm" else (to, BYTES[target])
            expected += [i] * chunks_of(address, numel, element, vector, 7)
        assert chunks == len(expected)
        assert list(struct.unpack_from(f"<{chunks}I", raw, 32 * len(rows))) == expected
        assert len(raw) == 32 * len(rows) + 4 * chunks


def test_sizes_are_64_bits(library: Loaded) -> None:
    numel = (1 << 33) + 5
    chunks, table = table_of(
        library.library, "copy", Pieces(array("Q", [512]), array("Q", [512]), array("Q", [numel]), b"\1", [])
    )
    assert chunks == -(-(numel // 4) // plan.GROUPS["copy"])
    assert struct.unpack_from("<QQQ", bytes(table[:24].tolist())) == (512, 512, numel)


def test_too_much_for_one_launch_is_an_error(library: Loaded) -> None:
    pieces = Pieces(array("Q", [0]), array("Q", [0]), array("Q", [1 << 60]), b"\1", [])
    with pytest.raises(KernelError, match=r"1 pieces of 1152921504606846976 elements are more than one launch moves"):
        table_of(library.library, "copy", pieces)


def test_kinds_of_pairs() -> None:
    f32, bf16, f16, f64, i32 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32
    assert kind_of("copy", bf16, f32) == 0x10
    assert kind_of("copy", f32, f16) == 0x02
    assert kind_of("copy", f16, bf16) == 0x21
    assert kind_of("copy", i32, i32) == kind_of("copy", bf16, bf16) == SAME
    assert kind_of("copy", f64, f32) is None
    assert kind_of("copy", torch.complex64, torch.complex64) is None
    assert kind_of("gather_grads", f32, bf16) == 0x01
    assert kind_of("gather_grads", f32, f64) is None
    assert kind_of("norm", bf16, bf16) == 0x11
    assert kind_of("norm", f64, f64) is None
    assert kind_of("publish", bf16, f32) == 0x10
    assert kind_of("publish", f32, f32) is None


def test_what_is_not_plain_memory_of_the_device_is_left_to_torch() -> None:
    grid = torch.zeros(4, 6)
    tensors = [grid, grid.t(), grid[:, 1:3], grid[1:3], torch.zeros(0), torch._neg_view(grid), grid.double()]
    target = [torch.zeros(t.shape) for t in tensors]
    found = pieces_of("copy", target, tensors, torch.device("cpu"))
    # get_device() is -1 for every tensor here, which is no device of the list.
    assert found.rest == [1, 2, 5, 6]
    assert list(found.numels) == [96, 0, 0, 48, 0, 0, 0]
    assert found.srcs[0] == grid.data_ptr()
    assert found.srcs[1] == found.dsts[6] == 0
    elsewhere = pieces_of("copy", target, tensors, torch.device("cuda", 0))
    assert elsewhere.rest == [0, 1, 2, 3, 5, 6]

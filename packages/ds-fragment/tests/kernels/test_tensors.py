"""Copies between tensors and a buffer: when what was prepared is used again, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from ds_fragment.kernels import stretches
from ds_fragment.kernels.plan import kind_of
from ds_fragment.kernels.stretches import Tensors

SIZES = (8, 3, 5)
OFFSETS = (0, 32, 44)


class Recorded:
    """Stands for the prepared copies; a table is its addresses and sizes."""

    made = 0
    moves = 0

    def __init__(
        self, dsts: Sequence[int], srcs: Sequence[int], numels: Sequence[int], kinds: bytes, device: torch.device
    ) -> None:
        type(self).made += 1
        self.table = (list(dsts), list(srcs), list(numels), kinds)

    def move(self, dst: torch.Tensor | None, src: torch.Tensor | None, *, blocks: int | None = None) -> None:
        assert (dst is None) != (src is None)
        type(self).moves += 1


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorded.made = Recorded.moves = 0
    monkeypatch.setattr(stretches, "Stretches", Recorded)
    monkeypatch.setattr(stretches, "all_plain", lambda tensors, device: all(t.is_contiguous() for t in tensors))


def packed() -> tuple[Tensors, torch.Tensor, list[torch.Tensor | None]]:
    tensors: list[torch.Tensor | None] = [torch.zeros(size) for size in SIZES]
    buffer = torch.empty(64, dtype=torch.uint8)
    copies = Tensors(OFFSETS, [torch.float32] * 3)
    for _ in range(2):  # nothing was prepared; they may be others every time
        assert not copies.again(buffer, tensors)
        assert copies.pack(buffer, [tensor for tensor in tensors if tensor is not None])
    return copies, buffer, tensors


def test_the_same_tensors_are_sent_again_without_being_prepared() -> None:
    copies, buffer, tensors = packed()
    for tensor in tensors:
        assert tensor is not None
        tensor += 1
    assert copies.again(buffer, tensors)
    assert copies.again(torch.empty_like(buffer), list(tensors))
    assert (Recorded.made, Recorded.moves) == (1, 4)


def shorter(tensors: list[torch.Tensor | None]) -> None:
    assert tensors[0] is not None
    tensors[0].data = tensors[0].data[:4]  # begins where it began


def of_another_dtype(tensors: list[torch.Tensor | None]) -> None:
    assert tensors[0] is not None
    tensors[0].data = tensors[0].data.view(torch.int32)


def elsewhere(tensors: list[torch.Tensor | None]) -> None:
    assert tensors[0] is not None
    tensors[0].data = torch.zeros(8)


def with_gaps(tensors: list[torch.Tensor | None]) -> None:
    assert tensors[0] is not None
    tensors[0].data = torch.zeros(16)[::2]


def another(tensors: list[torch.Tensor | None]) -> None:
    tensors[0] = torch.zeros(8)  # perhaps at the address, and with the id, of the one that goes


def one_less(tensors: list[torch.Tensor | None]) -> None:
    tensors.pop()


def nothing(tensors: list[torch.Tensor | None]) -> None:
    tensors[0] = None


@pytest.mark.parametrize("change", [shorter, of_another_dtype, elsewhere, with_gaps, another, one_less, nothing])
def test_tensors_that_changed_are_not(change: Callable[[list[torch.Tensor | None]], None]) -> None:
    copies, buffer, tensors = packed()
    change(tensors)
    assert not copies.again(buffer, tensors)
    assert Recorded.moves == 2


def test_others_that_look_alike_are_not_prepared_anew() -> None:
    copies, buffer, tensors = packed()
    alike = [tensor.detach() for tensor in tensors if tensor is not None]
    assert not copies.again(buffer, alike)
    assert copies.pack(buffer, alike)
    assert copies.again(buffer, alike)
    assert (Recorded.made, Recorded.moves) == (1, 4)


def test_others_of_any_look_are_packed_from_where_they_are() -> None:
    """As gradients, which are others at every step."""
    copies, buffer, tensors = packed()
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 1), (torch.float32, 4)):  # a cast counts elements
        others = [torch.ones(size, dtype=dtype) for size in SIZES]
        assert not copies.again(buffer, list(others))
        assert copies.pack(buffer, others)
        made = copies._stretches[False]
        assert isinstance(made, Recorded)
        kinds = bytes([kind_of("copy", torch.float32, dtype) or 0]) * 3
        where = [other.data_ptr() for other in others]
        assert made.table == (list(OFFSETS), where, [itemsize * size for size in SIZES], kinds)
    assert not copies.pack(buffer, [torch.ones(size, dtype=torch.int64) for size in SIZES])  # for which there is none
    assert copies.pack(buffer, [tensor for tensor in tensors if tensor is not None])


def test_the_head_is_put_before_what_is_packed_and_not_unpacked() -> None:
    head = torch.zeros(16, dtype=torch.uint8)
    buffer, tensors = torch.empty(128, dtype=torch.uint8), [torch.zeros(8)]
    copies = Tensors([16], [torch.float32], head=head)
    assert copies.pack(buffer, tensors)
    assert copies.unpack(buffer, tensors)
    into, out = copies._stretches[False], copies._stretches[True]
    assert isinstance(into, Recorded)
    assert isinstance(out, Recorded)
    assert into.table[:3] == ([16, 0], [tensors[0].data_ptr(), head.data_ptr()], [32, 16])
    assert out.table[:3] == ([tensors[0].data_ptr()], [16], [32])

"""Chunks packed by every rank and unpacked by one, without communication: on a CPU, and by the kernels on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from operator import is_
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ds_fragment import _chunks, _wire, use_kernels
from ds_fragment._layout import even_layout
from ds_fragment._place import Place
from ds_fragment._wire import Wire
from fragment_oracle import assert_same, bits
from test_exchange import DTYPES, cut_by_hand, noise, random_layout

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WHERE = [
    pytest.param("cpu", "auto", id="cpu"),
    pytest.param("cpu", "tables", id="tables"),  # what the kernels are told, without a GPU
    pytest.param("cuda", "cuda", id="kernels", marks=GPU),
    pytest.param("cuda", "reference", id="reference", marks=GPU),
]


class Group:
    """Stands for a process group: what a wire asks of one."""

    _device_types = (torch.device("cpu"), torch.device("cuda"))

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks

    def _get_backend(self, device: torch.device) -> object:
        return SimpleNamespace(supports_coalescing=device.type == "cuda")


@pytest.fixture(autouse=True)
def _no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(group.size())))


class Stretches:
    """Stands for the kernels' copies between buffers: byte by byte, as their table says."""

    def __init__(self, rows: list[tuple[int, int, int]]) -> None:
        self._rows = rows

    @classmethod
    def within(cls, rows: list[tuple[int, int, int]], device: torch.device) -> Stretches:
        return cls(rows)

    def move(self, dst: torch.Tensor, src: torch.Tensor, *, blocks: int | None = None) -> None:
        to, of = dst.view(torch.uint8), src.view(torch.uint8)
        for begin, start, length in self._rows:
            to[begin : begin + length] = of[start : start + length]


class Tensors:
    """Stands for the kernels' copies between tensors and a buffer."""

    def __init__(
        self, offsets: list[int], dtypes: list[torch.dtype], pieces: Any = None, numels: Any = None, head: Any = None
    ) -> None:
        self._offsets, self._dtypes, self._numels, self._head = offsets, dtypes, numels, head
        self._pieces = [(i, 0) for i in range(len(offsets))] if pieces is None else pieces
        self._last: list[torch.Tensor] = []

    def _pairs(self, buffer: torch.Tensor, tensors: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row, (offset, dtype) in enumerate(zip(self._offsets, self._dtypes, strict=True)):
            position, start = self._pieces[row]
            numel = tensors[position].numel() if self._numels is None else self._numels[row]
            room = buffer[offset : offset + numel * dtype.itemsize].view(dtype)
            yield room, tensors[position].view(-1)[start : start + numel]

    def pack(self, buffer: torch.Tensor, tensors: list[torch.Tensor], *, blocks: int | None = None) -> bool:
        if not all(tensor.is_contiguous() for tensor in tensors):
            return False
        for room, part in self._pairs(buffer, tensors):
            bits(room).copy_(bits(part))
        if self._head is not None:
            buffer[: len(self._head)] = self._head
        self._last = tensors
        return True

    def again(self, buffer: torch.Tensor, tensors: list[torch.Tensor | None], *, blocks: int | None = None) -> bool:
        same = len(tensors) == len(self._last) > 0 and all(map(is_, tensors, self._last))
        return same and self.pack(buffer, self._last)

    def unpack(self, buffer: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
        for room, part in self._pairs(buffer, tensors):
            bits(part).copy_(bits(room))
        return True


def wires(places: list[Place], ranks: int) -> list[Wire]:
    groups = [cast(Any, Group(rank, ranks)) for rank in range(ranks)]
    return [Wire(group, range(len(places)), places) for group in groups]


def drawn(chance: random.Random, generator: torch.Generator, ranks: int, device: str) -> Iterator[tuple[Place, Any]]:
    home = torch.device(device, 0) if device == "cuda" else torch.device(device)
    alike = chance.random() < 0.3  # many of one shape, as layers have them
    shape = torch.Size((chance.choice([4, 8, 3]), 8))
    for _ in range(chance.randint(1, 12)):
        if not alike:
            shape = torch.Size(chance.choice([0, 1, 2, 3, 5, 8, 64]) for _ in range(chance.randint(0, 3)))
        dense = noise(shape, chance.choice(DTYPES[:3] if alike else DTYPES), generator)
        kind = random_layout(chance, shape, ranks)
        if alike or chance.random() < 0.3:
            kind = even_layout(shape.numel(), ranks)
        yield Place(shape, dense.dtype, home, kind, cast(Any, Group(0, ranks))), dense


MIB = 1 << 10  # KiB


@pytest.mark.parametrize(
    ("device", "ranks", "packed", "gathered", "broadcast"),
    [
        ("cpu", 2, [4, 64], [256], [512, 31 * MIB, 32 * MIB]),
        ("cpu", 4, [4, 64], [256, 512], [31 * MIB, 32 * MIB]),
        ("cuda", 2, [4, 64, 256, 512, 31 * MIB], [], [32 * MIB]),
        ("cuda", 4, [4, 64, 256, 512, 31 * MIB], [32 * MIB], []),
    ],
)
def test_large_tensors_travel_in_place(
    device: str, ranks: int, packed: list[int], gathered: list[int], broadcast: list[int]
) -> None:
    home, group = torch.device(device, 0) if device == "cuda" else torch.device(device), cast(Any, Group(1, ranks))
    sizes = [4, 64, 256, 512, 31 * MIB, 32 * MIB]  # KiB
    shapes = [torch.Size((size << 8,)) for size in sizes]
    places = [Place(shape, torch.float32, home, even_layout(shape[0], ranks), group) for shape in shapes]
    wire = Wire(group, range(len(places)), places)
    assert [sizes[item] for section in wire.sections for item in section.items] == packed
    assert [sizes[item] for item in wire.even] == gathered
    assert [sizes[item] for item in wire.apart] == broadcast
    assert wire.pair is (device == "cuda" and ranks == 2)
    alone = Wire(group, [0], places)  # needs no packing
    assert (alone.even, alone.sections, alone.marked) == ([0], [], 0)


@pytest.mark.parametrize(("device", "kernels"), WHERE)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_all_ranks_pack_one_unpacks(
    monkeypatch: pytest.MonkeyPatch, ranks: int, device: str, kernels: Any
) -> None:
    monkeypatch.setattr(_wire, "_IN_PLACE", 1 << 40)
    monkeypatch.setattr(_wire, "_IN_PLACE_GPU", 1 << 40)
    chance, generator = random.Random(ranks), torch.Generator().manual_seed(ranks)
    seen = set()
    tables = kernels == "tables"
    if tables:
        kernels = "auto"
        monkeypatch.setattr(_wire._kernels, "usable", lambda device: True)
        monkeypatch.setattr(_wire._kernels, "Stretches", Stretches)
        monkeypatch.setattr(_wire._kernels, "Tensors", Tensors)
    with use_kernels(kernels):
        for _ in range(300):
            little = chance.choice([0, 1 << 20])
            monkeypatch.setattr(_chunks, "_LITTLE", little)
            monkeypatch.setattr(_chunks, "_LITTLE_GPU", little)
            drawings = list(drawn(chance, generator, ranks, device))
            places, denses = [place for place, _ in drawings], [dense for _, dense in drawings]
            made = [wire for wire in wires(places, ranks) if not wire.in_place]
            if not made:  # on a GPU one that is alone and even goes in place
                continue
            cuts = [
                [cut_by_hand(dense, place.layout, rank) for dense, place in zip(denses, places, strict=True)]
                for rank in range(ranks)
            ]
            held = [[None if piece is None else piece.to(places[0].device) for piece in cut] for cut in cuts]
            for _ in range(2):  # again, as a plan does
                landing = torch.full((made[0].chunks.begins[-1],), 255, dtype=torch.uint8, device=places[0].device)
                for rank, wire in enumerate(made):
                    assert wire.chunks.lengths == made[0].chunks.lengths
                    wire.load(
                        lambda items, p=held[rank]: [p[item] for item in items], {}, wire.chunks.of(landing, rank)
                    )
                    assert not wire.chunks.of(landing, rank)[: wire.chunks.head].any()
                for wire in made:
                    wire.chunks.shares = device == "cuda" or tables or chance.random() < 0.5
                    seen |= {section.cut for section in wire.sections}
                    rooms = [torch.empty(place.shape, dtype=place.dtype, device=place.device) for place in places]
                    out = chance.choice([None, rooms.__getitem__])
                    found = wire.chunks.unpack(landing, out)
                    wholes = found.wholes()
                    found.move(chance.choice([None, 1, 20]))
                    assert sorted(wholes) == list(range(len(places)))
                    for item, whole in wholes.items():
                        assert out is None or whole is rooms[item]
                        assert whole.is_contiguous()
                        assert whole.device == places[item].device
                        assert_same(whole.cpu(), denses[item], (places[item].layout, wire.sections))
    assert seen == {"even", "single", "runs", "boxes"}


@pytest.mark.parametrize(("device", "kernels"), [where for where in WHERE if where.id != "tables"])
def test_pieces_of_another_dtype_are_cast_and_pieces_that_moved_are_found(device: str, kernels: Any) -> None:
    places = [
        Place(torch.Size((n,)), torch.bfloat16, torch.device(device, 0), even_layout(n, 2), cast(Any, Group(0, 2)))
        for n in (64, 6, 64)
    ]
    made = wires(places, 2)
    held: list[list[torch.Tensor]] = []
    with use_kernels(kernels):
        for change in ("new", "new values", "new memory", "new strides", "new values", "new"):
            masters = [torch.randn(place.shape, device=device) for place in places]
            if change == "new":
                held = [[master.chunk(2)[rank].clone() for master in masters] for rank in range(2)]
            for rank, pieces in enumerate(held):
                for piece, master in zip(pieces, masters, strict=True):
                    if change == "new memory":
                        piece.data = torch.empty_like(piece)
                    elif change == "new strides":
                        piece.data = torch.empty(len(piece), 2, device=device)[:, 0]
                    piece.copy_(master.chunk(2)[rank])
            landing = torch.full((made[0].chunks.begins[-1],), 255, dtype=torch.uint8, device=device)
            for rank, wire in enumerate(made):
                wire.load(lambda items, p=held[rank]: [p[item] for item in items], {}, wire.chunks.of(landing, rank))
                assert not wire.chunks.of(landing, rank)[: wire.chunks.head].any()
            found = made[0].chunks.unpack(landing, None)
            found.move()
            for item, whole in found.wholes().items():
                assert torch.equal(whole, masters[item].bfloat16()), change

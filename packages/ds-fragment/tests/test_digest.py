"""Sums over the bits of many tensors: one by one as summed by hand, and different for different data."""

from __future__ import annotations

import pytest
import torch
from ds_fragment.collective.digest import checksums, digest_of_all, digests

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


def by_hand(piece: torch.Tensor) -> int:
    """The words of at most 32 bits, added as Python integers, in 64 bits."""
    data = bytes(piece.contiguous().view(-1).view(torch.uint8).tolist())
    size = min(piece.itemsize, 4)
    words = [int.from_bytes(data[i : i + size], "little", signed=size > 1) for i in range(0, len(data), size)]
    return (sum(words) + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_is_summed_by_itself(dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (0,), (2, 5), (1,), (7, 11)]
    pieces = [torch.randint(0, 200, shape, generator=chance).to(dtype) for shape in shapes]
    given = [*pieces, None, pieces[3].t(), torch.ones(4)]
    found = checksums(given)
    assert found == [0 if piece is None or not piece.numel() else by_hand(piece) for piece in given]


def test_large_ones_beside_small_ones() -> None:
    pieces = [torch.randn(size) for size in (5, 1 << 20, 3, 1 << 19, 1 << 19, 2)]
    assert checksums(pieces) == [
        by_hand(piece[:]) if len(piece) < 9 else int(piece.view(torch.int32).sum()) for piece in pieces
    ]
    assert checksums([]) == []


def test_a_bit_changes_a_sum() -> None:
    one, other = torch.randn(100), torch.randn(100)
    other[:] = one
    assert checksums([one, one]) == checksums([one, other])
    other.view(torch.int32)[37] ^= 1
    assert checksums([one])[0] != checksums([other])[0]


def test_sparse_ones_as_dense() -> None:
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert checksums([dense.to_sparse()]) == checksums([dense])


@pytest.mark.parametrize("kind", ["cpu", "meta"])  # of another device than a CPU words are summed
def test_a_digest_sees_every_change_of_order_sign_and_bit(kind: str) -> None:
    def of(value: torch.Tensor, dtype: torch.dtype | None = None) -> int:
        return digests([value], [dtype or value.dtype], torch.device(kind))[0]

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        value = torch.randn(40).to(dtype)
        assert of(value) == of(value.clone())
        assert of(value.float(), torch.bfloat16) == of(value.float().bfloat16())
        swapped = value.clone()
        swapped[[3, 17]] = swapped[[17, 3]]
        others = [value.flip(0), swapped, -value, value.float().sort().values.to(dtype), value.roll(1)]
        assert of(value) not in [of(other.contiguous()) for other in others]
    zero, square = torch.zeros(4), torch.randn(6, 6)
    assert of(zero) != of(-zero)
    assert of(square) != of(square.t())
    assert -(2**63) <= of(torch.full((100,), float("nan"))) < 2**63
    assert of(torch.empty(0)) == of(torch.empty(0))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_a_digest_of_many_elements(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from ds_fragment.collective import digest

    def of(value: torch.Tensor, dtype: torch.dtype) -> int:
        return digests([value], [dtype], torch.device(kind))[0]

    for at_once, columns in ((8, 1), (16, 2), (1 << 20, 4), (1 << 20, 1024)):
        monkeypatch.setattr(digest, "_AT_ONCE", at_once)
        monkeypatch.setattr(digest, "_COLUMNS", columns)
        value = torch.arange(50.0)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            same = of(value, dtype)
            assert same == of(value.clone(), dtype)
            assert same == of(torch.cat([torch.zeros(1), value])[1:], dtype)  # unaligned
            others = [torch.cat([value[8:16], value[:8], value[16:]]), value.flip(0), value.roll(1), -value, value[:-1]]
            for first, second in ((0, 1), (0, 2), (3, 40), (16, 48), (47, 49)):
                other = value.clone()
                other[[first, second]] = other[[second, first]]
                others.append(other)
            for item in range(50):
                other = value.clone()
                other[item] = 1000.0
                others.append(other)
            assert same not in [of(other, dtype) for other in others]
    assert digests([], [], torch.device(kind)) == []


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_one_digest_of_many_values(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from ds_fragment.collective import digest

    device, values = torch.device(kind), [torch.randn(size) for size in (5, 1, 0, 17, 3, 40)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.float32]
    for at_once in (1, 8, 1 << 20):
        monkeypatch.setattr(digest, "_AT_ONCE", at_once)
        same = digest_of_all(values, dtypes, device)
        assert same == digest_of_all([value.clone() for value in values], dtypes, device)
        others = [[*values[:at], -values[at], *values[at + 1 :]] for at in (0, 1, 3, 4, 5)]
        others.append([values[0], values[1], values[2], values[3].flip(0), *values[4:]])
        assert same not in [digest_of_all(other, dtypes, device) for other in others]
    assert digest_of_all([], [], device) == digest_of_all([], [], device)

"""The kernels in plain torch, against arithmetic in other precisions and published test vectors."""

from __future__ import annotations

import math

import pytest
import torch
from ds_fragment.kernels import reference
from ds_fragment.kernels.reference import dither, philox, words


def test_philox_gives_the_published_vectors() -> None:
    """Known answers for Philox4x32-10, from the Random123 distribution."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        assert philox(torch.tensor([counter]), torch.tensor(key))[0].tolist() == expected


def test_words_depend_on_seed_and_place_alone() -> None:
    cpu = torch.device("cpu")
    whole = words(7, 3, 1000, cpu)
    assert torch.equal(whole[:77], words(7, 3, 77, cpu))
    assert torch.equal(whole, words(torch.tensor(7), 3, 1000, cpu))
    assert torch.equal(words(-1, 0, 8, cpu), words((1 << 64) - 1, 0, 8, cpu))
    for other in (words(8, 3, 1000, cpu), words(7, 4, 1000, cpu), words(7 << 32, 3, 1000, cpu)):
        assert (whole == other).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 3e4, 1e-6])
def test_rounding_at_random_is_right_on_average(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    values = (torch.rand(2000) + 0.1) * size
    seeds = 400
    outs = torch.stack([dither(values, words(seed, 0, 2000, values.device), dtype) for seed in range(seeds)]).double()
    near = values.to(dtype).double()
    up = torch.nextafter(values.to(dtype), torch.tensor(math.inf, dtype=dtype)).double()
    gap = (up - near).abs()
    assert ((outs - values.double()).abs() < gap).all()
    assert (abs((outs.mean(0) - values.double()) / gap) < 5.5 * 0.5 / seeds**0.5).all()
    assert abs(((outs - values.double()) / gap).mean().item()) < 5 * 0.5 / (seeds * 2000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_needs_no_rounding_stays(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = dither(every.float(), words(1, 0, 65536, every.device), dtype)
    finite = every.isfinite()
    assert torch.equal(out.view(torch.int16)[finite], every.view(torch.int16)[finite])
    assert torch.equal(out.isnan(), every.isnan())
    assert torch.equal(out[every.isinf()], every[every.isinf()])
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest * (1 + 2**-11), torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    assert torch.equal(dither(beyond, words(1, 0, 3, beyond.device), dtype), beyond.to(dtype))


def test_copies_of_one_dtype_keep_every_bit() -> None:
    for dtype, integer in [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)]:
        bits = torch.randint(-(2**15), 2**15, (1000,)).to(integer)
        if integer == torch.int32:
            bits[:4] = torch.tensor([0x7F800001, 0x7FC12345, -1, -(2**31)])
        out = torch.zeros(10, 100, dtype=dtype)
        reference.copy([out], [bits.view(dtype)])
        assert torch.equal(out.view(integer).view(-1), bits)


def test_copies_reshape_cast_and_skip_what_is_empty() -> None:
    grid = torch.randn(6, 4)
    outs = [torch.zeros(24, dtype=torch.bfloat16), torch.zeros(4, 6, dtype=torch.float64), torch.zeros(0, 3)]
    reference.copy(outs, [grid, grid.t(), torch.zeros(0)])
    assert torch.equal(outs[0], grid.view(-1).bfloat16())
    assert torch.equal(outs[1], grid.t().double())


@pytest.mark.parametrize("accumulate", [False, True])
def test_gathered_gradients_and_their_statistics(accumulate: bool) -> None:
    grads = [torch.randn(7).bfloat16(), torch.randn(3, 5).half(), torch.zeros(0)]
    dsts = [torch.randn(g.numel()) for g in grads]
    start = [d.double() for d in dsts]
    found = torch.zeros(())
    stats = reference.gather_grads(dsts, grads, scale=torch.tensor(0.25), accumulate=accumulate, found_inf=found)
    whole = torch.cat(
        [(s if accumulate else 0) + g.double().view(-1) * 0.25 for s, g in zip(start, grads, strict=True)]
    )
    torch.testing.assert_close(torch.cat(dsts).double(), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats.norm, whole.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.largest, whole.abs().amax(), rtol=1e-6, atol=0)
    assert stats.nonfinite == 0
    assert found == 0
    grads[1][0, 0], grads[0][1] = math.inf, math.nan
    stats = reference.gather_grads(dsts, grads, found_inf=found)
    assert stats.nonfinite == 2
    assert found == 1
    assert stats.norm.isnan()
    assert stats.largest.isnan()


def test_found_inf_is_not_taken_back() -> None:
    found = torch.ones(1)
    reference.gather_grads([torch.zeros(2)], [torch.ones(2)], found_inf=found)
    assert found == 1


def test_the_norm_of_many_tensors() -> None:
    tensors = [torch.randn(5).bfloat16(), torch.zeros(0), torch.randn(2, 3).double()]
    whole = torch.cat([t.double().view(-1) for t in tensors])
    stats = reference.norm(tensors)
    torch.testing.assert_close(stats.sum_squares, whole.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.largest, whole.abs().amax(), rtol=1e-6, atol=0)
    assert reference.norm([]).values.tolist() == [0, 0, 0]

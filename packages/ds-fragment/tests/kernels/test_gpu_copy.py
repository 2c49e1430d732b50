"""On a CUDA device: copies are the same bits as torch's, whatever the layout, and touch nothing else."""

from __future__ import annotations

import random

import pytest
import torch
from ds_fragment import kernels
from ds_fragment.kernels import reference, use_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(a, b) for a in FLOATS for b in FLOATS]
SAME = [(t, t) for t in (torch.uint8, torch.int16, torch.int32, torch.float64, torch.bool, torch.float8_e4m3fn)]
ARENA = 4 << 20
POISON = 0xA5
SPECIAL = {
    torch.float32: [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x80000000, 1, 0x80000001, 0x7FFFFF,
                    0x7F7FFFFF, 0x7F7F8000, 0x477FF000, 0x38000001, 0x33000000, 0x33000001, 0x3F808000, 0x3F818000],
    torch.bfloat16: [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x8000, 1, 0x8001, 0x7F, 0x7F7F, 0x477F, 0x3300],
    torch.float16: [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x8000, 1, 0x8001, 0x3FF, 0x7BFF],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels_must_run():
    with use_kernels("cuda"):
        yield


def arena(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random bits, a tenth of them special values: uint8, (ARENA,)."""
    memory = torch.randint(0, 256, (ARENA,), dtype=torch.uint8, device="cuda", generator=generator)
    if dtype in SPECIAL:
        width = dtype.itemsize
        as_int = memory.view(torch.int32 if width == 4 else torch.int16)
        values = torch.tensor(SPECIAL[dtype], dtype=torch.int64, device="cuda").to(as_int.dtype)
        chosen = values[torch.randint(0, len(values), as_int.shape, device="cuda", generator=generator)]
        where = torch.rand(as_int.shape, device="cuda", generator=generator) < 0.1
        as_int.copy_(torch.where(where, chosen, as_int))
    if dtype == torch.bool:
        memory &= 1
    return memory


def layout(rng: random.Random, srcs: torch.Tensor, dsts: torch.Tensor) -> list[tuple[int, int, int]]:
    """(offset in srcs, offset in dsts, numel) of pieces at random places, in elements; no two overlap."""
    found, s, d = [], 0, 0
    for _ in range(rng.randrange(1, 24)):
        numel = rng.choice([0, 1, rng.randrange(70), rng.randrange(70), rng.randrange(3000), rng.randrange(90000)])
        s, d = s + rng.randrange(20), d + rng.choice([0, 0, 1, rng.randrange(20)])
        if s + numel > srcs.numel() or d + numel > dsts.numel():
            break
        found.append((s, d, numel))
        s, d = s + numel, d + numel
    return found


@pytest.mark.parametrize(("src", "dst"), PAIRS + SAME, ids=str)
def test_copies_are_torchs_bits_in_random_layouts(src: torch.dtype, dst: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    rng = random.Random(f"{src} {dst}")
    memory = arena(src, generator).view(src)
    out, expected = (torch.empty(ARENA, dtype=torch.uint8, device="cuda") for _ in range(2))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    pieces = 0
    for _ in range(250):
        pairs = layout(rng, memory, out.view(dst))
        srcs = [memory[s : s + n] for s, _, n in pairs]
        for target in (out, expected):
            target.fill_(POISON if dst != torch.bool else 1)
        kernels.copy([out.view(dst)[d : d + n] for _, d, n in pairs], srcs)
        reference.copy([expected.view(dst)[d : d + n] for _, d, n in pairs], srcs)
        wrong += (out != expected).sum()
        pieces += len(pairs)
    assert wrong.item() == 0
    assert pieces > 1000


def test_one_call_moves_every_pair_of_dtypes() -> None:
    generator = torch.Generator("cuda").manual_seed(2)
    rng = random.Random(2)
    memory = {src: arena(src, generator).view(src) for src in FLOATS}
    for _ in range(150):
        srcs, whole, expected, cuts = [], [], [], []
        for src, dst in PAIRS:
            numel, s, d = rng.randrange(40000), rng.randrange(16), rng.randrange(16)
            srcs.append(memory[src][s : s + numel])
            whole.append(torch.full((d + numel + 9,), -7.0, dtype=dst, device="cuda"))
            expected.append(whole[-1].clone())
            cuts.append(slice(d, d + numel))
        kernels.copy([out[cut] for out, cut in zip(whole, cuts, strict=True)], srcs)
        reference.copy([out[cut] for out, cut in zip(expected, cuts, strict=True)], srcs)
        for out, right in zip(whole, expected, strict=True):
            assert torch.equal(out.view(torch.uint8), right.view(torch.uint8))


def test_what_the_kernel_cannot_move_is_moved_all_the_same() -> None:
    grid = torch.randn(64, 48, device="cuda")
    srcs = [grid[:, 3:17], grid.t(), grid.double(), torch.randn(5), torch.randn(7, device="cuda"), grid[:0]]
    dsts = [torch.empty(src.shape, dtype=torch.bfloat16, device="cuda") for src in srcs]
    kernels.copy(dsts, srcs)
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src.cuda().bfloat16())


def test_more_than_two_to_the_31_elements() -> None:
    numel = (1 << 31) + 12_345
    srcs = torch.randint(-30000, 30000, (numel + 1,), dtype=torch.int16, device="cuda").view(torch.bfloat16)[1:]
    dsts = torch.full((numel + 8,), -7.0, device="cuda")
    kernels.copy([dsts[3 : 3 + numel]], [srcs])
    step = 1 << 28
    for i in range(0, numel, step):
        part = dsts[3 + i : 3 + min(i + step, numel)]
        assert torch.equal(part.view(torch.int32), srcs[i : i + step].float().view(torch.int32)), i
    assert dsts[:3].tolist() == [-7.0] * 3
    assert dsts[3 + numel :].tolist() == [-7.0] * 5
    back = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
    kernels.copy([back], [dsts[3 : 3 + numel]])
    kernels.copy([dsts.view(torch.bfloat16)[1 : 1 + numel]], [back])
    expected = torch.empty_like(back)
    for i in range(0, numel, step):
        expected[i : i + step] = srcs[i : i + step].float().bfloat16()
        assert torch.equal(back[i : i + step].view(torch.int16), expected[i : i + step].view(torch.int16)), i
    assert torch.equal(dsts.view(torch.int16)[1 : 1 + numel], back.view(torch.int16))
    back.normal_()
    stats = kernels.norm([back])
    squares = sum(back[i : i + step].float().square().sum(dtype=torch.float64) for i in range(0, numel, step))
    assert abs(stats.sum_squares / squares - 1).item() < 1e-6

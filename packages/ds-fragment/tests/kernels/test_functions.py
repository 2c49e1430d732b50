"""The functions on the CPU: what they take and refuse, and as torch operators."""

from __future__ import annotations

import pytest
import torch
from ds_fragment import kernels
from ds_fragment.errors import InvalidValueError


def one(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def test_what_does_not_match_is_named_and_nothing_is_written() -> None:
    good, bad = torch.zeros(3), torch.zeros(4)
    for call in (kernels.copy, kernels.gather_grads):
        with pytest.raises(InvalidValueError, match=r"there are 1 dsts for 2 srcs, expected one for each"):
            call([good], [one(3), one(3)])
        with pytest.raises(InvalidValueError, match=r"dsts\[1\] has 4 elements and srcs\[1\] 5, expected as many"):
            call([good, bad], [one(3), one(5)])
    with pytest.raises(InvalidValueError, match=r"dsts\[0\] has dtype torch.bfloat16, expected torch.float32"):
        kernels.gather_grads([one(3, dtype=torch.bfloat16)], [one(3)])
    with pytest.raises(InvalidValueError, match=r"srcs\[0\] has dtype torch.int64, expected a floating-point one"):
        kernels.norm([torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(InvalidValueError, match=r"dsts\[1\] has dtype torch.float64 .* stochastic rounding goes from"):
        kernels.publish([good, good.double()], [one(3), one(3)], seed=1)
    assert not good.any()
    assert not bad.any()


def test_publishing_with_a_seed_repeats_and_without_rounds_to_nearest() -> None:
    master = [one(1000), one(3, 5)]
    outs = [[torch.zeros(m.shape, dtype=torch.bfloat16) for m in master] for _ in range(4)]
    for out, seed in zip(outs, (5, 5, 6, None), strict=True):
        kernels.publish(out, master, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(outs[0], outs[1], strict=True))
    assert not torch.equal(outs[0][0], outs[2][0])
    assert all(torch.equal(a, m.bfloat16()) for a, m in zip(outs[3], master, strict=True))


def test_weights_that_stay_fp32_are_copied() -> None:
    out = [torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)]
    master = [one(4), one(4)]
    kernels.publish(out, master, seed=1)
    assert torch.equal(out[0], master[0])


def test_compiled_code_is_one_graph_and_gives_the_same() -> None:
    def step(hp: list[torch.Tensor], lp: list[torch.Tensor]) -> torch.Tensor:
        kernels.copy(lp, [x * 2 for x in hp])
        stats = kernels.gather_grads(hp, lp, scale=0.5)
        kernels.publish(lp, hp, seed=3)
        return stats.values + kernels.norm(lp).values

    hp, lp = [one(5), one(3, 4)], [one(5, dtype=torch.bfloat16), one(3, 4, dtype=torch.bfloat16)]
    other_hp, other_lp = [x.clone() for x in hp], [x.clone() for x in lp]
    expected = step(other_hp, other_lp)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(hp, lp)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(hp + lp, other_hp + other_lp, strict=True))


def test_operators_are_declared_as_they_behave() -> None:
    low, high = [one(5, dtype=torch.bfloat16)], [one(5)]
    ops = torch.ops.ds_fragment
    calls = {
        ops.copy.default: (low, high),
        ops.gather_grads.default: (high, low, 0.5, None, True, torch.zeros(1)),
        ops.norm.default: (low,),
        ops.publish.default: (low, high, 3, None),
    }
    for op, arguments in calls.items():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_autograd_sees_what_was_written() -> None:
    from ds_fragment.kernels.functions import written

    weight = torch.ones(3)
    before = weight._version
    written([weight])
    assert weight._version > before
    with torch.inference_mode():
        inference = torch.ones(3)
    written([inference, weight])
    assert weight._version > before + 1

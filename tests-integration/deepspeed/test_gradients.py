"""What gradients are at each moment of a window, in every ZeRO stage: reduced, or refused with a reason."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch
import torch.distributed as dist
from ds_fragment import tensor_fragment as ours
from engines import ENV, TIMEOUT, Case, backward, make_engine, trained
from oracles import dense_gradients, loss_scale, lp_weights, told
from ranks import run_ranks

CASES = [
    *(Case(stage, "fp32", gas=2) for stage in ("zero1", "zero2", "zero3")),
    *(Case(stage, "fp16", gas=2) for stage in ("zero1", "zero2", "zero3")),
    *(Case(stage, "bf16", gas=2, offload=True) for stage in ("zero1", "zero2", "zero3")),
    Case("zero2", "fp32", gas=2, offload=True, zero={"round_robin_gradients": True}),
    Case("bf16opt", "bf16", gas=2),
]
UNUSED = "no backward pass used it since the last optimizer step"
UNREDUCED = "what is here is this rank's own"
MIXED = "what an earlier step had left"
LR = 0.01
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-2, "fp16": 1e-2}  # of the norm; the backward pass itself is in that dtype


def why(param: torch.Tensor, *, replicated: bool = False) -> str:
    """Why every rank is refused the gradient, however it asks."""
    one = told(lambda: ours.safe_get_full_grad(param), replicated=replicated)
    many = told(lambda: list(ds_fragment.iter_full([param], "grad")), replicated=replicated)
    norm = told(lambda: ds_fragment.norms([param], "grad"), replicated=replicated)
    write = told(lambda: ours.safe_set_full_grad(param, torch.zeros_like(ours.safe_get_full_fp32_param(param))))
    assert one == many == norm, (one, many, norm)
    assert write.split(": ", 2)[-1] == one.split(": ", 1 if replicated else 2)[-1], (write, one)
    assert one.startswith("GradientUnavailableError: "), one
    return one


def assert_sgd(after: torch.Tensor, before: torch.Tensor, grad: torch.Tensor, case: Case) -> None:
    """A step of SGD with `LR`, and weight decay for matrices."""
    decay = 0.01 if before.dim() > 1 else 0.0
    expected = before - LR * (grad + decay * before)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7, msg=lambda text: f"{case}: {text}")


class Window:
    """One engine, and what its gradients should be."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.engine = make_engine(case, optimizer=torch.optim.SGD, lr=LR)
        ds_fragment.attach(self.engine)
        self.params = trained(self.engine)
        self.local = {"zero1", "bf16opt"} >= {case.stage}
        self.forgets = case.stage != "zero3" and not case.offload  # whether an unused gradient is a zero
        self.replicated = case.stage == "bf16opt"

    def check(self, step: int, used: list[bool], skip: tuple[str, ...] = ()) -> None:
        """All gradients are near the mean over the ranks of the sum over the micro batches so far, in fp32."""
        expected = dense_gradients(self.engine, lp_weights(self.engine), step, len(used), lambda micro: used[micro])
        chosen = {name: param for name, param in self.params.items() if name not in skip}
        found = dict(ds_fragment.iter_full(chosen.items(), "grad"))
        for name, grad in found.items():
            assert grad.dtype == torch.float32
            error = float((grad - expected[name]).norm()) / max(float(expected[name].norm()), 1e-3)
            assert error < TOLERANCE[self.case.dtype], (str(self.case), step, used, name, error)
        for name, norm in ds_fragment.norms(chosen.items(), "grad").items():
            assert norm == pytest.approx(float(found[name].double().norm()), rel=1e-12), (str(self.case), name)

    def refused(self, reason: str, *names: str) -> None:
        for name in names or ("b.bias", "extra"):
            assert reason in why(self.params[name], replicated=self.replicated), (str(self.case), name)

    def first_micro(self, step: int, *, extra: bool) -> None:
        backward(self.engine, step, 0, extra=extra)
        if self.local:
            self.refused(UNREDUCED, "a.weight")
        else:
            self.check(step, [extra], () if extra or self.forgets else ("extra",))
        self.engine.step()  # counts the micro batch, and no more

    def check_usual(self) -> None:
        self.refused(UNUSED)
        for step in range(2):
            self.first_micro(step, extra=True)
            backward(self.engine, step, 1)
            self.check(step, [True, True])
            self.check_beside_deepspeed()
            self.engine.step()
            self.refused(UNUSED)

    def check_beside_deepspeed(self) -> None:
        """DeepSpeed's own gradients are the same, to the bit, but for the loss scale; where they are right."""
        from deepspeed.utils import safe_get_full_grad as theirs

        if self.case.stage == "bf16opt" or "round_robin_gradients" in self.case.zero:
            return
        scale = loss_scale(self.engine)
        assert (scale > 1) == (self.case.dtype == "fp16")
        for name, param in self.params.items():
            assert torch.equal(theirs(param).float() / scale, ours.safe_get_full_grad(param)), (str(self.case), name)

    def check_unused(self, step: int) -> None:
        """Left out of a whole window: zero where DeepSpeed steps with that, and never an older one."""
        self.first_micro(step, extra=False)
        backward(self.engine, step, 1, extra=False)
        if self.forgets:
            self.check(step, [False, False])
        else:
            self.check(step, [False, False], ("extra",))
            extra = self.params["extra"]
            assert ours.safe_get_full_grad(extra) is None
            assert ours.safe_get_local_grad(extra) is None or not ours.safe_get_local_grad(extra).numel()
            text = told(lambda: list(ds_fragment.iter_full([extra], "grad")))
            assert text.startswith("UnusedGradientError: "), text
            assert UNUSED in text
            assert "extra" not in dict(ds_fragment.iter_full(self.params.items(), "grad", missing="skip"))
        self.engine.step()

    def check_half_used(self, step: int) -> None:
        """Left out of the first micro batch: right, or refused where DeepSpeed adds it to an older one."""
        self.first_micro(step, extra=False)
        backward(self.engine, step, 1, extra=True)
        if self.case.stage == "zero3" or (self.case.stage == "zero2" and self.case.offload):
            self.check(step, [False, True], ("extra",))
            self.refused(MIXED, "extra")
        else:
            self.check(step, [False, True])
        self.engine.step()
        self.refused(UNUSED)

    def check_writing(self, step: int) -> None:
        """What is written is what the engine steps with."""
        self.first_micro(step, extra=True)
        backward(self.engine, step, 1)
        before = dict(ds_fragment.iter_full(self.params.items(), "value"))
        generator = torch.Generator().manual_seed(step)
        new = {n: torch.randn(v.shape, generator=generator).bfloat16().float() for n, v in before.items()}
        ds_fragment.set_many([(self.params[name], tensor) for name, tensor in new.items()], "grad")
        param = self.params["b.weight"]
        mine = ds_fragment.get_local(param, "grad") * 0.5
        ds_fragment.set_local(param, mine, "grad")
        ds_fragment.update_many(self.params.items(), lambda _name, grad: grad.mul_(2.0), "grad")
        found = dict(ds_fragment.iter_full(self.params.items(), "grad"))
        for name, tensor in new.items():
            assert torch.equal(found[name], tensor if name == "b.weight" else 2 * tensor), (str(self.case), name)
        scale = loss_scale(self.engine)
        self.engine.step()
        grown = loss_scale(self.engine) / scale  # DeepSpeed divides by the loss scale of the next step
        for name, value in ds_fragment.iter_full(self.params.items(), "value"):
            assert_sgd(value, before[name], found[name] / grown, self.case)


def live(rank: int, cases: list[Case]) -> None:
    for case in cases:
        window = Window(case)
        window.check_usual()
        window.check_unused(2)
        window.check_half_used(3)
        window.check_writing(4)
        window.check_unused(5)
        window.engine.destroy()


def test_two_ranks():
    run_ranks(live, 2, CASES, env=ENV, timeout=TIMEOUT)


def test_three_ranks():
    chosen = [case for case in CASES if case.dtype == "fp32" or case.stage == "bf16opt"]
    run_ranks(live, 3, chosen, env=ENV, timeout=TIMEOUT)


def clip(rank: int) -> None:
    """A written gradient is clipped by its own norm, the same on all ranks."""
    for case in (
        Case("bf16opt", "bf16", config={"gradient_clipping": 0.5}),
        *(Case(f"zero{stage}", "fp16", offload=True, config={"gradient_clipping": 0.5}) for stage in (1, 2, 3)),
        Case("zero2", "bf16", config={"gradient_clipping": 0.5}),
    ):
        engine = make_engine(case, optimizer=torch.optim.SGD, lr=LR)
        ds_fragment.attach(engine)
        params = trained(engine)
        backward(engine, 0)
        ds_fragment.update_many(params.items(), lambda _name, grad: torch.full_like(grad, 0.25), "grad")
        total = sum(square**2 for square in ds_fragment.norms(params.items(), "grad").values()) ** 0.5
        before = dict(ds_fragment.iter_full(params.items(), "value"))
        engine.step()
        for name, value in ds_fragment.iter_full(params.items(), "value"):
            assert_sgd(value, before[name], torch.full_like(value, 0.25 * 0.5 / total), case)
        assert engine.get_global_grad_norm() == pytest.approx(total, rel=1e-5), str(case)
        engine.destroy()


def overflow(rank: int) -> None:
    """A gradient that overflows skips the step, written or not, on the device or offloaded."""
    for case in (Case("zero2", "fp16"), *(Case(f"zero{stage}", "fp16", offload=True) for stage in (2, 3))):
        engine = make_engine(case)
        ds_fragment.attach(engine)
        params = trained(engine)
        backward(engine, 0)
        before = dict(ds_fragment.iter_full(params.items(), "value"))
        param = params["b.weight"]
        ours.safe_set_full_grad(param, torch.full((11, 7), float("inf")))
        assert ds_fragment.count_nonfinite(params.items(), "grad") == {n: 77 * (n == "b.weight") for n in params}
        engine.step()
        assert engine.optimizer.overflow, str(case)
        after: dict[Any, torch.Tensor] = dict(ds_fragment.iter_full(params.items(), "value"))
        assert all(torch.equal(before[name], after[name]) for name in before), str(case)
        assert UNUSED in why(param)
        assert told(lambda p=param: ours.safe_get_full_optimizer_state(p, "step")).startswith("StateNotReady")
        engine.destroy()


def unaveraged(rank: int) -> None:
    """Offloaded ZeRO-1 with fp32 accumulation steps with gradients that it never averages: they are refused."""
    case = Case("zero1", "bf16", offload=True, config={"data_types": {"grad_accum_dtype": "fp32"}})
    engine = make_engine(case)
    ds_fragment.attach(engine)
    backward(engine, 0)
    assert "never averaged" in why(engine.module.b.weight)
    assert dist.get_world_size() == 2


def odd_cases(rank: int) -> None:
    clip(rank)
    overflow(rank)
    unaveraged(rank)


def test_clipping_overflows_and_gradients_that_are_not_averaged():
    run_ranks(odd_cases, 2, env=ENV, timeout=TIMEOUT)

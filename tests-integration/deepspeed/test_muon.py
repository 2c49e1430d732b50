"""DeepSpeed's Muon: its gradients are refused where they are its updates already, and its momentum is read whole."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None or not importlib.util.find_spec("deepspeed.runtime.zero.muon"):
    pytest.skip("needs DeepSpeed with Muon", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch
from ds_fragment import tensor_fragment as ours
from engines import ENV, TIMEOUT, Case, Net, backward, make_engine, trained
from oracles import dense_gradients, lp_weights, told
from ranks import run_ranks

CASES = [Case("zero1"), Case("zero2"), Case("zero2", gas=2), Case("zero3", zero={"reduce_scatter": False})]
MOMENTUM = 0.9


class Matrices(Net):
    """Tells DeepSpeed which parameters Muon updates."""

    def __init__(self, width: int = 1) -> None:
        super().__init__(width)
        for param in self.parameters():
            param.use_muon = param.dim() == 2  # type: ignore[attr-defined]


def muon(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Matrices with Muon, the rest with Adam."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    matrices, rest = groups
    made: torch.optim.Optimizer = MuonWithAuxAdam(
        [
            {**matrices, "use_muon": True, "lr": lr, "momentum": MOMENTUM},
            {**rest, "use_muon": False, "lr": lr, "betas": (0.9, 0.95), "eps": 1e-8},
        ]
    )
    return made


def _engine(rank: int, case: Case) -> None:
    engine = make_engine(case, optimizer=muon, net=Matrices)
    ds_fragment.attach(engine)
    params = trained(engine)
    matrices = {name: param for name, param in params.items() if param.use_muon}  # type: ignore[attr-defined]
    assert 0 < len(matrices) < len(params)
    momenta = {name: torch.zeros(ours.safe_get_full_fp32_param(param).shape) for name, param in matrices.items()}
    for step in range(2):
        expected = dense_gradients(engine, lp_weights(engine), step, case.gas, lambda micro: True)
        for micro in range(case.gas):
            backward(engine, step, micro)
            if micro < case.gas - 1:
                engine.step()
        for name, param in params.items():
            if name in matrices and not case.is_zero3:
                words = told(lambda param=param: ours.safe_get_full_grad(param))  # type: ignore[misc]
                assert words.startswith("GradientUnavailableError: ")
                assert "orthogonalised update" in words
                zeros = torch.zeros(momenta[name].shape)
                words = told(lambda p=param, zeros=zeros: ours.safe_set_full_grad(p, zeros))  # type: ignore[misc]
                assert "orthogonalised update" in words
            else:
                torch.testing.assert_close(ours.safe_get_full_grad(param), expected[name], rtol=1e-5, atol=1e-6)
        engine.step()
        for name, momentum in momenta.items():
            momentum.lerp_(expected[name], 1 - MOMENTUM)
        for name, found in ds_fragment.iter_full(matrices.items(), "momentum_buffer"):
            torch.testing.assert_close(found, momenta[name], rtol=1e-4, atol=1e-6)
        for name, norm in ds_fragment.norms(matrices.items(), "momentum_buffer").items():
            assert norm == pytest.approx(float(momenta[name].norm()), rel=1e-4)
        for name in params.keys() - matrices.keys():
            assert ours.safe_get_full_optimizer_state(params[name], "step") == step + 1
    written = {param: torch.full(momenta[name].shape, float(i)) for i, (name, param) in enumerate(matrices.items())}
    ds_fragment.set_many(written, "momentum_buffer")
    for param, whole in written.items():
        assert torch.equal(ours.safe_get_full_optimizer_state(param, "momentum_buffer"), whole)  # type: ignore[arg-type]
        local = ours.safe_get_local_optimizer_state(param, "momentum_buffer")
        assert (local == whole.flatten()[0]).all()  # on each rank that keeps it


@pytest.mark.parametrize("case", CASES, ids=str)
def test_muon(case: Case) -> None:
    run_ranks(_engine, 2, case, env={**ENV, "TORCHDYNAMO_DISABLE": "1"}, timeout=TIMEOUT)

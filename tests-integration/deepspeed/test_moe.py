"""DeepSpeed's mixture of experts: they differ from one expert-parallel rank to the next, and have their own groups."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
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
from engines import ENV, TIMEOUT, Case, configuration, groups_of
from oracles import STATES, as_torch, differing, same, told
from ranks import run_ranks
from torch import nn

LR = 0.05
WIDTH, EXPERTS, EXPERT_RANKS = 5, 4, 2
EAGER = {**ENV, "TORCHDYNAMO_DISABLE": "1"}  # DeepSpeed has its gate compiled, which takes longer than all the rest


class Mixture(nn.Module):
    """A layer, a mixture whose experts two ranks share between them, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.first = nn.Linear(WIDTH, WIDTH)
        self.mixture = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=EXPERTS, ep_size=EXPERT_RANKS, k=1)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, WIDTH) -> scalar"""
        mixed, loss, _ = self.mixture(torch.tanh(self.first(x)))
        out: torch.Tensor = self.last(mixed).float().square().mean() + 0.01 * loss
        return out


def make_mixture(case: Case) -> Any:
    """An engine over all ranks, which all must call it."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    warnings.simplefilter("ignore")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    torch.manual_seed(0)
    model = Mixture()
    torch.manual_seed(dist.get_rank() % EXPERT_RANKS)  # experts of their own on each expert-parallel rank
    for name, param in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(param)
    groups = [{**group, "name": f"group {index}"} for index, group in enumerate(groups_of(model))]
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(groups), lr=LR)
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(case), dist_init_required=False)
    return made[0]


def backward(engine: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.randn(8, WIDTH, generator=generator).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(x))


def whole(engine: Any, what: str) -> dict[str, torch.Tensor]:
    return {str(name): tensor for name, tensor in ds_fragment.iter_full(engine.module, what)}


def experts_are_read_and_written(rank: int, case: Case, folder: str) -> None:
    engine = make_mixture(case)
    ds_fragment.attach(engine)
    params = dict(engine.module.named_parameters())
    experts = [name for name in params if "experts" in name]
    assert len(experts) == 2 * EXPERTS // EXPERT_RANKS
    for step in range(3):
        backward(engine, step)
        state = {key: whole(engine, key) for key in STATES} if step else {}
        value, grad = whole(engine, "value"), whole(engine, "grad")
        engine.step()
        expected = as_torch(value, grad, state, LR)
        for what, tensors in expected.items():
            assert not differing(whole(engine, what), tensors), (str(case), what, step)
    weights = {name: tensor.to(case.lp) for name, tensor in whole(engine, "value").items()}
    assert not differing(weights, {name: param.detach() for name, param in params.items()})

    # The ranks with the same experts have the same values, the others have their own, of the same names.
    for name, tensor in whole(engine, "value").items():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, tensor)
        assert same(everywhere[rank], everywhere[(rank + EXPERT_RANKS) % len(everywhere)]), name
        assert same(everywhere[0], everywhere[1]) == (name not in experts), name
        assert same(ours.safe_get_full_fp32_param(params[name]), tensor)
    everything = whole(engine, "value")
    for name, norm in ds_fragment.norms(engine.module).items():
        assert norm == pytest.approx(everything[str(name)].double().norm().item(), rel=1e-12)

    # What is written is each expert-parallel rank's own too.
    numbers = {name: float(rank % EXPERT_RANKS if name in experts else 7) for name in params}
    new = {name: torch.full(params[name].shape, number) for name, number in numbers.items()}
    ds_fragment.set_many([(params[name], tensor) for name, tensor in new.items()])
    assert not differing(whole(engine, "value"), new)
    assert not differing({name: param.detach().float() for name, param in params.items()}, new)

    # A file has room for one tensor of each name.
    text = told(lambda: ds_fragment.save_full(engine.module, Path(folder, "model.safetensors")))
    assert "InvalidValueError" in text
    assert "expert-parallel ranks have different tensors under the names" in text
    assert "mixture." in text
    assert not list(Path(folder).iterdir())
    engine.destroy()


@pytest.mark.parametrize("case", [Case("zero1", "fp32"), Case("zero2", "bf16")], ids=str)
def test_experts_are_read_and_written(case: Case, tmp_path: Path) -> None:
    run_ranks(experts_are_read_and_written, 4, case, str(tmp_path), env=EAGER, timeout=TIMEOUT)

"""The real DeepSpeed and this package see each other's leaves, and ZeRO-3 trains a model marked here."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

import torch
from ranks import run_ranks
from torch import nn

# The first start compiles DeepSpeed's communication operator for CPUs.
ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
TIMEOUT = 280.0
STEPS, WIDTH, EXPERTS = 3, 8, 6


class Moe(nn.Module):
    """Sends every row to one expert; an expert that no row goes to is not called at all."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, choice = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.experts[index](x[rows]) * best[rows].unsqueeze(-1))
        return out


class SparseMoe(Moe):
    """Known to nobody by its own name."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Moe(), SparseMoe()])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).square().mean()


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(rank: int, step: int) -> torch.Tensor:
    """As many rows as the rank's number, plus one."""
    return 2 * torch.randn(rank + 1, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def compare_flags(rank: int) -> dict[str, Any]:
    import ds_z3leaf
    from deepspeed import utils

    seen: dict[str, Any] = {}
    net = make()
    blocks = list(net.blocks)

    ds_z3leaf.set_z3_leaf_modules(net, ["Moe"])
    seen["marked here, read there"] = utils.get_z3_leaf_modules(net) == blocks
    inner = {id(param) for block in blocks for param in block.parameters()}
    seen["parameters"] = all(utils.z3_leaf_parameter(param) == (id(param) in inner) for param in net.parameters())
    utils.unset_z3_leaf_modules(net, [Moe, SparseMoe])  # some versions match no subclasses
    seen["unmarked there, read here"] = ds_z3leaf.get_z3_leaf_modules(net) == []

    utils.set_z3_leaf_modules(net, [Moe, SparseMoe])
    seen["marked there, read here"] = ds_z3leaf.get_z3_leaf_modules(net) == blocks
    ds_z3leaf.unset_z3_leaf_modules(net, [Moe])
    seen["unmarked here, read there"] = utils.get_z3_leaf_modules(net) == [] and not any(
        utils.z3_leaf_parameter(param) for param in net.parameters()
    )

    if importlib.util.find_spec("deepspeed.runtime.zero.leaf_module_config") is None:
        return seen  # before 0.18, its configuration has no leaves
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES, DeepSpeedZeroLeafModuleConfig
    from ds_z3leaf._config import DEFAULT_CLASSES

    seen["defaults"] = list(DEFAULT_CLASSES) == DEFAULT_LEAF_MODULE_CLASSES
    config = DeepSpeedZeroLeafModuleConfig(names=["head"], name_suffixes=["1"])
    found = ds_z3leaf.apply_zero_leaf_module_config(net, config)
    wanted = [*(block.experts[1] for block in net.blocks), net.blocks[1], net.head]
    seen["its configuration"] = {id(module) for module in found} == {id(module) for module in wanted}
    # The second block is a leaf, so its expert is none.
    outermost = [net.blocks[0].experts[1], net.blocks[1], net.head]
    seen["read there"] = utils.get_z3_leaf_modules(net) == outermost
    return seen


def test_each_sees_what_the_other_marked() -> None:
    (seen,) = run_ranks(compare_flags, 1, timeout=TIMEOUT, env=ENV, init=False)
    assert [what for what, right in seen.items() if not right] == []


def compare_granularity(rank: int) -> list[tuple[str, int, list[str], list[str]]]:
    """Names of the leaves that DeepSpeed's threshold makes, and of those found here."""
    import deepspeed
    import ds_z3leaf
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    deepspeed.init_distributed("gloo")
    models = {
        "mixtures": make,
        "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
        "nested": lambda: nn.Sequential(nn.Sequential(make(), nn.Linear(50, 50)), nn.ModuleList([make()])),
        "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2),
    }
    seen = []
    for kind, build in models.items():
        for threshold in (20, 60, 72, 80, 100, 1000, 10**9):
            model = build()
            for param in model.parameters():
                param.ds_numel = param.numel()
            there = object.__new__(DeepSpeedZeRoOffload)
            there.min_granularity_value, there.min_granularity_layer = 2**63, None
            there.granularity_info, there.z3_leaf_layers = set(), []
            there._set_z3_leaf_modules_by_threshold(model, threshold)
            names = {id(module): name for name, module in model.named_modules()}
            here = ds_z3leaf.find_fine_grained(model, max_elements_per_module=threshold)
            leaves = [names[id(module)] for module in there.z3_leaf_layers]
            seen.append((kind, threshold, leaves, [leaf.name for leaf in here]))
    return seen


def test_fine_grained_modules_are_those_of_deepspeeds_threshold() -> None:
    (seen,) = run_ranks(compare_granularity, 1, timeout=TIMEOUT, env=ENV, init=True)
    assert [row for row in seen if row[2] != row[3]] == []
    assert {bool(row[2]) for row in seen} == {True, False}


def train(rank: int) -> tuple[dict[str, Any], dict[str, bool]]:
    import deepspeed
    import ds_z3leaf

    net = make()
    found = [candidate.module for candidate in ds_z3leaf.find_leaf_candidates(net)]
    ds_z3leaf.mark_leaves(net, modules=found)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 otherwise
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    owners = {name: getattr(param, "ds_z3_leaf_module", None) for name, param in net.named_parameters()}
    seen = {
        "leaves": deepspeed.utils.get_z3_leaf_modules(net) == list(net.blocks) == found,
        "owner": all((owner is not None) == name.startswith("blocks.") for name, owner in owners.items()),
        "here": all(ds_z3leaf.z3_leaf_parameter(param) for param in net.blocks[0].experts.parameters()),
        "units": all(block in engine.optimizer.leaf_parameters for block in net.blocks),
        "candidates": [candidate.module for candidate in ds_z3leaf.find_leaf_candidates(net)] == found,
    }
    for step in range(STEPS):
        engine.backward(engine(batch(rank, step)))
        engine.step()
    values = {}
    for name, param in net.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            values[name] = param.detach().tolist()
    return values, seen


def reference(world_size: int) -> dict[str, torch.Tensor]:
    """One process, plain PyTorch: the mean of all ranks' losses, zeros for what nobody used."""
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(world_size):
            (net(batch(rank, step)) / world_size).backward()
        for param in net.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimizer.step()
    return {name: param.detach() for name, param in net.named_parameters()}


def test_zero_3_trains_a_model_marked_here() -> None:
    expected = reference(2)
    for values, seen in run_ranks(train, 2, timeout=TIMEOUT, env=ENV):
        assert [what for what, right in seen.items() if not right] == []
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(values[name]), value, rtol=1e-4, atol=1e-5)

"""An engine's ranks that wait in different experts are told so, and train once the leaf that is named is marked."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from mixtures import ListMixture, Net, rows

ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}  # for DeepSpeed
SECONDS = 5  # until a collective gives up


class UnequalMixture(ListMixture):
    """Its experts have different sizes, so that gathers of different ones do not fit each other."""

    def __init__(self) -> None:
        super().__init__(top=1)
        for size, expert in enumerate(self.experts, 1):
            expert.w1, expert.w2, expert.w3 = (
                torch.nn.Linear(*shape, bias=False) for shape in ((16, 8 * size), (8 * size, 16), (16, 8 * size))
            )


def make() -> Net:
    torch.manual_seed(0)
    return Net(UnequalMixture)


def zero3(net: Net, leaves: list[str]) -> Any:
    from datetime import timedelta

    import deepspeed
    import torch.distributed as dist
    from ds_z3leaf import mark_leaves

    if leaves:
        mark_leaves(net, names=leaves)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    for group in list(dist.distributed_c10d._world.pg_map):
        group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=SECONDS))
    return engine, engine.backward


def fsdp2(net: Net, leaves: list[str]) -> Any:
    from datetime import timedelta

    import torch.distributed as dist
    from ds_z3leaf import fully_shard_leaves
    from torch.distributed.fsdp import fully_shard

    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    if leaves:
        fully_shard_leaves(net, [net.get_submodule(name) for name in leaves], mesh=mesh)
    else:
        for layer in net.layers:
            for expert in layer.mlp.experts:
                fully_shard(expert, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, torch.Tensor.backward


def train(rank: int, engine: str, leaves: list[str]) -> tuple[str, list[float]]:
    """One step under `watch`: the text of the error, or the losses."""
    from ds_z3leaf import LeafHangError, watch

    model, backward = {"zero3": zero3, "fsdp2": fsdp2}[engine](make(), leaves)
    losses = []
    try:
        with watch(model, timeout=1.0):
            for step in range(2):
                loss = model(**rows(rank, step))
                backward(loss)
                losses.append(loss.item())
    except LeafHangError as error:
        return str(error), losses
    return "", losses


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_leaf_that_is_named_makes_it_train(engine: str) -> None:
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    leaves: list[str] = []
    for _ in range(2):  # there is a mixture in either layer
        texts = [text for text, _ in run_ranks(train, 2, engine, leaves, timeout=120.0, env=ENV)]
        if not any(texts):
            break
        print(texts[0])
        assert texts[0] == texts[1]
        named = re.search(r"Make '(layers\.\d\.mlp)' \(UnequalMixture\) a leaf", texts[0])
        assert named is not None
        assert re.search(r"in 'layers\.\d\.mlp' \(UnequalMixture\), rank 0 .* where rank 1 ", texts[0])
        leaves.append(named.group(1))
    assert leaves
    for text, losses in run_ranks(train, 2, engine, ["layers.0.mlp", "layers.1.mlp"], timeout=120.0, env=ENV):
        assert text == ""
        assert len(losses) == 2

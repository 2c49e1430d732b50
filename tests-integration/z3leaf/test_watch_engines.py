"""An engine's ranks that wait in different experts are told so, and train once the leaf that is named is marked."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from mixtures import EXPERTS, WIDTH, ListMixture

ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}  # for DeepSpeed
SECONDS = 5  # until a collective gives up


class Short(nn.Module):
    """Ends with a mixture: a rank that uses fewer experts has nothing more to gather, and the others wait for it.

    Gloo ends a process in which collectives of different sizes meet, so that nothing may follow the mixture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.mlp = ListMixture(top=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + 0.1 * self.inp(x))[0].square().mean()


def make() -> Short:
    torch.manual_seed(0)
    net = Short()
    with torch.no_grad():
        net.mlp.gate.weight.copy_(torch.eye(EXPERTS, WIDTH))
    return net


def one_row_for_each(*experts: int) -> torch.Tensor:
    return 3 * torch.eye(WIDTH)[list(experts)]


def zero3(net: Short, leaves: list[str]) -> Any:
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


def fsdp2(net: Short, leaves: list[str]) -> Any:
    from datetime import timedelta

    import torch.distributed as dist
    from ds_z3leaf import fully_shard_leaves
    from torch.distributed.fsdp import fully_shard

    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    if leaves:
        fully_shard_leaves(net, [net.get_submodule(name) for name in leaves], mesh=mesh)
    else:
        for expert in net.mlp.experts:
            fully_shard(expert, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, torch.Tensor.backward


def train(rank: int, engine: str, leaves: list[str]) -> tuple[str, list[float]]:
    """Two steps under `watch`: the text of the error, and the losses."""
    from ds_z3leaf import LeafHangError, watch

    model, backward = {"zero3": zero3, "fsdp2": fsdp2}[engine](make(), leaves)
    x = one_row_for_each(0) if rank == 0 else one_row_for_each(1, 2)
    losses = []
    try:
        with watch(model, timeout=1.0):
            with torch.no_grad():
                losses.append(model(x).item())
            if not leaves:
                time.sleep(SECONDS)  # as in a loader: the other rank waits in its second expert
            losses.append(model(x))
            backward(losses[-1])
    except LeafHangError as error:
        return str(error), []
    return "", [float(loss) for loss in losses]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_leaf_that_is_named_makes_it_train(engine: str) -> None:
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    first, second = [text for text, _ in run_ranks(train, 2, engine, [], timeout=120.0, env=ENV)]
    assert first == second
    cause, zero, one = first.splitlines()
    assert re.search(r"in 'mlp' .*rank 0 calls 'mlp\.experts\.0' .*where rank 1 calls 'mlp\.experts\.1' ", cause)
    assert "rank 0: between forwards" in zero
    assert "rank 1: in the forward of 'mlp.experts.2" in one
    named = re.search(r"mark_leaves\(model, names='(.*?)'\)", cause)
    assert named is not None
    expected = [make()(one_row_for_each(*chosen)).item() for chosen in ((0,), (1, 2))]
    for rank, (text, losses) in enumerate(run_ranks(train, 2, engine, [named.group(1)], timeout=120.0, env=ENV)):
        assert text == ""
        assert losses == pytest.approx([expected[rank]] * 2, rel=1e-5)

"""Any calls in any order, one rank spoilt at random: nobody waits for anybody, and those that share hear the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, available, count_nonfinite, iter_full, norms, set_many, update_many
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from fragment_oracle import ragged, raised
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

QUANTITIES = ["value", "grad", "exp_avg", "exp_avg_sq", "step"]
ONE_AXIS: list[tuple[Placement, Placement]] = [(Shard(0), Replicate()), (Replicate(), Shard(0))]


def on_a_mesh() -> nn.ParameterList:
    """Parameters over both axes of a mesh, over either, and over none."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    ways = [(Shard(0), Shard(1)), *ONE_AXIS, (Replicate(), Replicate()), *ONE_AXIS]
    return nn.ParameterList(nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, way)) for way in ways)


class Training:
    """Sharded parameters, and some of this rank alone, after two steps and another backward pass."""

    def __init__(self, engine: str) -> None:
        model: nn.Module = on_a_mesh() if engine == "mesh" else ragged(fsdp2=engine != "flat")
        alone = nn.Linear(3, 2)
        self.partition: FlatPartition | None = None
        if engine == "flat":
            self.partition = FlatPartition(model.bfloat16().parameters())
            sharded, owned = list(self.partition.params), [self.partition.hp_param]
        else:
            size = dist.get_world_size()
            if engine == "hybrid":
                fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards")))
            elif engine == "fsdp2":
                fully_shard(model)
            sharded = owned = [param for param in model.parameters() if param.requires_grad]
        self.kept = model
        self.sharded = len(sharded)
        self.params: list[torch.Tensor] = [*sharded, *alone.parameters()]
        self.owned: list[torch.Tensor] = [*owned, *alone.parameters()]
        self.optimizer = torch.optim.AdamW(self.owned, foreach=False)
        attach(model, self.optimizer)
        attach(alone, self.optimizer)
        for _ in range(2):
            self._backward()
            self.optimizer.step()
        self._backward()

    def _backward(self) -> None:
        for param in self.params:
            param.grad = torch.ones_like(param)
        if self.partition is not None:
            self.partition.reduce_gradients()

    def spoil(self, chance: random.Random, here: bool) -> Callable[[], None]:
        """Take something away or change it, on this rank if it is the one; returns what mends it."""
        kind, owned = chance.choice(["nothing", "key", "state", "dtype", "grad", "number"]), chance.choice(self.owned)
        key, param = chance.choice(QUANTITIES[2:]), chance.choice(self.params)
        if not here or kind == "nothing":
            return lambda: None
        if kind == "grad":
            grad, param.grad = param.grad, None
            return lambda: setattr(param, "grad", grad)
        state = self.optimizer.state[owned]
        kept = dict(state)
        if kind == "state":
            state.clear()
        elif kind == "number":
            state["step"] = 7
        elif kind == "key":
            del state[key]
        else:
            state[key] = state[key].to(torch.bfloat16)
        return lambda: state.update(kept)

    def call(self, chance: random.Random) -> tuple[str, Callable[[], object]]:
        """One of the calls that all ranks make together, and who should hear the same of it."""
        what, chosen = chance.choice(QUANTITIES), chance.sample(range(len(self.params)), chance.randint(1, 4))
        size, dst = chance.choice([None, 1, 200]), chance.choice([None, None, 0, 1])
        some = [self.params[i] for i in chosen]
        one, ids = some[0], list(map(id, some))
        kind = chance.choice(["iter", "iter", "one", "one", "norms", "count", "available", "update", "set", "set one"])
        about = f"{kind} '{what}' of {chosen} by {size} to {dst}"
        shared = min(chosen[:1] if "one" in kind else chosen) < self.sharded
        who = "nobody" if not shared else "sharers" if kind in ("iter", "one", "norms", "count") else "everybody"
        if kind == "available":  # what is this rank's alone may be available here alone
            some = [self.params[i] for i in chosen if i < self.sharded]
        read = {"value": safe_get_full_fp32_param, "grad": safe_get_full_grad}.get(what)
        calls: dict[str, Callable[[], object]] = {
            "iter": lambda: list(iter_full(some, what, bucket_bytes=size, dst=dst)),
            "one": lambda: read(one) if read else safe_get_full_optimizer_state(one, what),
            "norms": lambda: norms(some, what=what),
            "count": lambda: count_nonfinite(some, what=what),
            "available": lambda: (
                [str(ids.index(id(param))) for param in available(some, what)] if what != "value" else None
            ),
            "update": lambda: update_many(some, lambda _, tensor: tensor, what, bucket_bytes=size),
            "set": lambda: set_many({param: torch.ones(param.shape if what != "step" else ()) for param in some}, what),
            "set one": lambda: safe_set_full_optimizer_state(one, torch.ones(one.shape), "exp_avg"),
        }
        return f"{who}: {about}", calls[kind]


def outcome(call: Callable[[], object]) -> Any:
    """The error, or which parameters are available, or None."""
    results: list[object] = []
    error = raised(lambda: results.append(call()))
    return error or (results[0] if isinstance(results[0], list) and str in map(type, results[0]) else None)


def _any_order(rank: int, engine: str, ranks: int, rounds: int) -> list[tuple[str, Any]]:
    chance, training = random.Random(ranks * 1000 + len(engine)), Training(engine)
    told = []
    for _ in range(rounds):
        mend = training.spoil(chance, rank == chance.randrange(ranks))
        for _ in range(chance.randint(1, 3)):
            about, call = training.call(chance)
            told.append((about, outcome(call)))
            total = torch.ones(())
            dist.all_reduce(total)  # nobody is in another collective
            assert total == ranks, about
        mend()
        for what in QUANTITIES if chance.random() < 0.1 else ():
            assert len(list(iter_full(training.params, what))) == len(training.params)  # all is well again
    return told


@pytest.mark.parametrize(
    ("engine", "ranks"), [("flat", 2), ("flat", 3), ("fsdp2", 2), ("fsdp2", 3), ("hybrid", 4), ("mesh", 4)]
)
def test_every_call_comes_to_an_end(engine: str, ranks: int) -> None:
    everybodys = run_ranks(_any_order, ranks, engine, ranks, 300)
    calls = list(zip(*everybodys, strict=True))
    assert len(calls) > 200
    assert sum(any(isinstance(error, tuple) for _, error in told) for told in calls) > 15
    for told in calls:
        (about,) = {about for about, _ in told}
        errors = [error for _, error in told]
        if about.startswith("everybody"):
            assert all(error == errors[0] for error in errors), told
        elif about.startswith("sharers") and engine != "mesh":  # rows of replicas read for themselves
            row = 2 if engine == "hybrid" else ranks
            for first in range(0, ranks, row):
                assert all(error == errors[first] for error in errors[first : first + row]), told

"""None where callers of `deepspeed.utils` expect it: what is not trained, and what a backward pass did not use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, available, iter_full
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
)
from fragment_oracle import raised
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

UNAVAILABLE = "GradientUnavailableError"


class Model(nn.Module):
    """One part is used, one is not, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 4) -> ()"""
        return self.used(self.frozen(x)).square().sum()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def kind_of(read: Any) -> str | None:
    try:
        return None if read() is None else "a tensor"
    except Exception as error:
        return type(error).__name__


def answers(model: nn.Module) -> dict[str, str | None]:
    """By parameter, what the full and the local getter say of its gradient; they agree but for an empty local piece."""
    found = {}
    for name, param in model.named_parameters():
        full = kind_of(lambda param=param: safe_get_full_grad(param))
        local = kind_of(lambda param=param: safe_get_local_grad(param))
        assert full == local or (local == "a tensor" and not safe_get_local_grad(param).numel()), (name, full, local)
        found[name.replace("module.", "").replace("_fsdp_wrapped_", "")] = full
    return found


def expected(used: str | None, unused: str | None) -> dict[str, str | None]:
    kinds = {"used": used, "unused": unused, "frozen": None}
    return {f"{part}.{name}": kind for part, kind in kinds.items() for name in ("weight", "bias")}


def _engine(rank: int, engine: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = Model()
    wrapped = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    elif engine == "fsdp2":
        fully_shard(model.used)
        fully_shard(model)
    elif engine == "fsdp1":
        model.used = FullyShardedDataParallel(model.used, use_orig_params=True, device_id=torch.device("cpu"))
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(trained(wrapped), lr=0.1)
    attach(wrapped, optimizer)
    x = torch.full((2, 4), 1.0 + rank)
    assert answers(wrapped) == expected(UNAVAILABLE, UNAVAILABLE)
    for _ in range(2):
        wrapped(x).backward()
        zeros = engine == "fsdp1"  # which keeps them for all of a flat parameter that it made
        assert answers(wrapped) == expected("a tensor", "a tensor" if zeros else None)
        gradients = dict(iter_full(wrapped, "grad", missing="skip"))
        assert sorted(gradients) == [*(["unused.bias", "unused.weight"] * zeros), "used.bias", "used.weight"]
        assert not any(grad.any() for name, grad in gradients.items() if "unused" in name)
        assert kind_of(lambda: list(iter_full(wrapped, "grad"))) == "UnusedGradientError"
        optimizer.step()
        optimizer.zero_grad()
        assert answers(wrapped) == expected(UNAVAILABLE, UNAVAILABLE)
        assert [name for name, _ in available(wrapped, "grad")] == []
    frozen = dict(wrapped.named_parameters())
    frozen = next(param for name, param in frozen.items() if "frozen" in name and name.endswith("weight"))
    assert safe_get_full_fp32_param(frozen).shape == (4, 4)
    for read in (safe_get_full_optimizer_state, safe_get_local_optimizer_state):
        assert read(frozen, "exp_avg") is None
    used = model.used.weight
    assert safe_get_full_optimizer_state(used, "exp_avg").shape == (3, 4)
    assert raised(lambda: safe_get_full_optimizer_state(used, "nope"))[0] == "StateKeyError"
    state = dict(iter_full([("used", used), ("frozen", frozen)], "exp_avg", missing="skip"))
    assert list(state) == ["used"]
    if zeros:
        return
    # The optimizer makes no state for what has no gradient: that is not ready, and not absent.
    kind, text = raised(lambda: safe_get_full_optimizer_state(model.unused.weight, "exp_avg"))
    assert (kind, "parameter 'unused.weight' has no optimizer state yet" in text) == ("StateNotReadyError", True)
    assert kind_of(lambda: list(iter_full(wrapped, "exp_avg", missing="skip"))) == "StateNotReadyError"


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2", "fsdp1"])
def test_engine(engine: str) -> None:
    run_ranks(_engine, 2, engine)


def _without_sync(rank: int) -> None:
    """What is not reduced yet is an error, used or not."""
    torch.manual_seed(0)
    model = Model()
    fully_shard(model)
    attach(model, torch.optim.SGD(trained(model), lr=0.1))
    model.set_requires_gradient_sync(False)
    model(torch.ones(1, 4)).backward()
    assert answers(model) == expected(UNAVAILABLE, UNAVAILABLE)


def test_without_sync() -> None:
    run_ranks(_without_sync, 2)


def _flat(rank: int) -> None:
    torch.manual_seed(0)
    model = Model()
    partition = FlatPartition(model.parameters(), dist.group.WORLD)
    optimizer = torch.optim.AdamW([partition.hp_param], lr=0.1)
    attach(model, optimizer)
    model(torch.ones(1, 4)).backward()
    assert answers(model) == {**expected(UNAVAILABLE, UNAVAILABLE), "unused.weight": UNAVAILABLE}
    partition.reduce_gradients()
    assert answers(model) == expected("a tensor", None)
    optimizer.step()
    partition.publish()
    assert answers(model) == expected(UNAVAILABLE, UNAVAILABLE)
    assert safe_get_full_optimizer_state(model.frozen.weight, "exp_avg") is None
    assert safe_get_full_optimizer_state(model.unused.weight, "exp_avg") is not None


def test_flat_partition() -> None:
    run_ranks(_flat, 2)


def _used_elsewhere(rank: int) -> list[str]:
    """A gradient that one rank lost is an error everywhere, and never None."""
    torch.manual_seed(0)
    model = Model()
    fully_shard(model)
    attach(model, torch.optim.SGD(trained(model), lr=0.1))
    model(torch.ones(1, 4)).backward()
    if rank == 0:
        model.used.weight.grad = None
    return [
        kind_of(lambda: safe_get_full_grad(model.used.weight)) or "None",
        kind_of(lambda: list(iter_full([model.used.bias, model.used.weight], "grad"))) or "None",
    ]


def test_a_gradient_that_one_rank_lost() -> None:
    mine, other = run_ranks(_used_elsewhere, 2)
    assert mine == other == [UNAVAILABLE, UNAVAILABLE]


def test_state_of_a_parameter_frozen_later_is_still_read() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param])
    attach(None, optimizer)
    param.sum().backward()
    optimizer.step()
    param.requires_grad_(False)
    assert safe_get_full_optimizer_state(param, "exp_avg") is not None


def test_missing_is_checked() -> None:
    with pytest.raises(ValueError, match="missing is 'ignore', expected 'raise' or 'skip'"):
        list(iter_full([], "grad", missing="ignore"))  # type: ignore[arg-type]

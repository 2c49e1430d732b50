"""Optimizer state of every kind is whole and the same on all ranks, or refused in words that say what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import attach, iter_full, norms, state_keys
from ds_fragment.errors import InvalidValueError, StateKeyError
from ds_fragment.tensor_fragment import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
)
from fragment_oracle import assert_same, from_every_rank, raised
from ranks import run_ranks
from torch import nn

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "asgd": torch.optim.ASGD,
    "lbfgs": lambda params: torch.optim.LBFGS(params, max_iter=2),  # no more: each rank stops by its own loss
    "rprop": torch.optim.Rprop,
}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    OPTIMIZERS["muon"] = lambda params: torch.optim.Muon([param for param in params if param.dim() == 2])


class Quantised(torch.Tensor):
    """Keeps integers and a scale, as the 8-bit optimizers of torchao do; knows one operator."""

    def __new__(cls, codes: torch.Tensor, scale: float) -> Quantised:
        made: Quantised = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        return made

    def __init__(self, codes: torch.Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


class Opaque(Quantised):
    """One that nobody can read."""

    dequantize = torch.Tensor.dequantize


class Named(torch.Tensor):
    """A class of its own that holds its data as any tensor does."""


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))  # on 2 ranks: uneven, and nothing on one of them


def sharded() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model)
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params)
    attach(model, optimizer)
    optimizer.kept = model  # type: ignore[attr-defined]
    return params, optimizer


def both_ways(param: torch.Tensor, key: str) -> tuple[str, str] | None:
    """What a read of one and of many, and a norm, all raise."""
    one = raised(lambda: safe_get_full_optimizer_state(param, key))
    assert raised(lambda: list(iter_full([param], key))) == one
    assert raised(lambda: norms([param], key)) == one
    return one


def _local_pieces(rank: int) -> list[Any]:
    params, optimizer = sharded()
    found = []
    for param in params:
        optimizer.state[param]["mom"] = param.to_local().detach() * 2  # type: ignore[attr-defined]
        found.append(both_ways(param, "mom"))
        zeros = torch.zeros(param.shape)
        assert raised(lambda zeros=zeros, param=param: safe_set_full_optimizer_state(param, zeros, "mom")) is not None  # type: ignore[misc]
        assert_same(safe_get_local_optimizer_state(param, "mom"), optimizer.state[param]["mom"])
    return found


def test_a_plain_tensor_of_the_local_shape_might_be_anything() -> None:
    mine, other = run_ranks(_local_pieces, 2)
    assert mine == other
    for kind, text in mine:
        assert kind == "StateKeyError"
        assert "nothing says what it is a part of" in text
        assert "safe_get_local_optimizer_state" in text


def _what_all_hold(rank: int) -> list[Any]:
    params, optimizer = sharded()
    param = params[0]
    state = optimizer.state[param]
    alike = {
        "whole": torch.arange(20.0).view(5, 4),
        "scale": torch.tensor(3.0),
        "one": torch.tensor([2.0], dtype=torch.float64),
        "step": 7,
        "rate": 0.25,
        "flag": True,
    }
    state.update(alike)
    for key, entry in alike.items():
        expected = entry if isinstance(entry, torch.Tensor) else torch.tensor(entry)
        for _ in range(2):
            assert_same(safe_get_full_optimizer_state(param, key), expected, key)
            assert_same(dict(iter_full([param], key))[param], expected, key)
    found = []
    for key, entry in alike.items():
        state[key] = not rank if key == "flag" else entry + rank
        found.append(both_ways(param, key))
        state[key] = entry
        assert both_ways(param, key) is None
    state["scale"] = torch.tensor(float(rank))
    safe_set_full_optimizer_state(param, torch.tensor(5.0), "scale")  # a write makes it the same
    assert_same(safe_get_full_optimizer_state(param, "scale"), torch.tensor(5.0))
    return found


def test_what_all_ranks_hold_whole_is_read_if_it_is_the_same() -> None:
    mine, other = run_ranks(_what_all_hold, 2)
    assert mine == other
    assert all(kind == "StateKeyError" and "differs over the ranks" in text for kind, text in mine)


def _refused(rank: int) -> list[Any]:
    params, optimizer = sharded()
    param = params[0]
    entries: dict[str, Any] = {
        "rows": torch.zeros(param.to_local().shape[0], 1),  # type: ignore[attr-defined]  # the same on both but for the shape
        "some": torch.zeros(2, 2),
        "directions": [torch.ones(3)],
        "nothing": None,
        "words": "x",
        "table": {"a": 1},
        "huge": 1 << 70,
        "sparse": torch.zeros(5, 4).to_sparse(),
    }
    optimizer.state[param].update(entries)
    return [(key, both_ways(param, key)) for key in entries]


def test_what_is_no_whole_is_refused_by_name() -> None:
    mine, other = run_ranks(_refused, 2)
    assert mine == other
    words = {
        "rows": "plain tensor of shape (3, 1) beside a DTensor of shape (5, 4)",
        "some": "plain tensor of shape (2, 2)",
        "directions": "is a list, neither a tensor nor a number",
        "nothing": "is a NoneType, neither",
        "words": "is a str, neither",
        "table": "is a dict, neither",
        "huge": "an integer of more than 64 bits",
        "sparse": "a tensor of layout torch.sparse_coo",
    }
    for key, (kind, text) in mine:
        assert kind == "StateKeyError", (key, text)
        assert f"'{key}' of parameter '0.weight'" in text
        assert words[key] in text


def _placed_otherwise(rank: int) -> list[Any]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    params, optimizer = sharded()
    param: Any = params[0]
    dense = torch.arange(20.0).view(5, 4)
    state = optimizer.state[param]
    state["columns"] = distribute_tensor(dense, param.device_mesh, [Shard(1)])
    state["copied"] = distribute_tensor(dense[:, 0].contiguous(), param.device_mesh, [Replicate()])
    state["diverged"] = DTensor.from_local(dense + rank, param.device_mesh, [Replicate()], run_check=False)
    state["sum"] = DTensor.from_local(dense, param.device_mesh, [Partial()])
    assert_same(safe_get_full_optimizer_state(param, "columns"), dense)
    assert_same(safe_get_full_optimizer_state(param, "copied"), dense[:, 0])
    return [both_ways(param, "diverged"), both_ways(param, "sum")]


def test_state_that_is_placed_otherwise() -> None:
    mine, other = run_ranks(_placed_otherwise, 2)
    assert mine == other
    assert mine[0][0] == "StateKeyError"
    assert mine[1][0] == "InvalidValueError"
    assert "'sum' of parameter '0.weight'" in mine[1][1]


def _kept_otherwise(rank: int) -> list[Any]:
    params, optimizer = sharded()
    param = params[0]
    optimizer.state[param]["kept"] = torch.ones(param.shape, dtype=torch.float64 if rank else torch.float32)
    return [both_ways(param, "kept")]


def test_state_of_one_kind_here_and_another_there_is_refused() -> None:
    mine, other = run_ranks(_kept_otherwise, 2)
    assert mine == other
    assert mine[0][0] == "RankMismatchError"
    assert "is not kept alike" in mine[0][1]


def _quantised(rank: int) -> list[Any]:
    params, optimizer = sharded()
    found = []
    for param in params:
        state = optimizer.state[param]
        local = param.to_local()  # type: ignore[attr-defined]
        codes = torch.arange(local.numel()).view(local.shape) + rank
        for key, kind in (("exp_avg", Quantised), ("opaque", Opaque)):
            state[key] = param.detach() * 0
            state[key]._local_tensor = kind(codes, 0.5)
        state["named"] = (param.detach() * 2).full_tensor().as_subclass(Named)  # type: ignore[attr-defined]
        pieces = [piece.float() for piece in from_every_rank(codes)]
        assert_same(safe_get_full_optimizer_state(param, "exp_avg"), torch.cat(pieces) * 0.5)
        assert_same(dict(iter_full([param], "exp_avg"))[param], torch.cat(pieces) * 0.5)
        assert_same(safe_get_full_optimizer_state(param, "named"), param.full_tensor().detach() * 2)  # type: ignore[attr-defined]
        found.append(both_ways(param, "opaque"))
        zeros = torch.zeros(param.shape)
        found.append(raised(lambda zeros=zeros, param=param: safe_set_full_optimizer_state(param, zeros, "exp_avg")))  # type: ignore[misc]
    return found


def test_a_quantised_tensor_is_read_dequantised_and_not_written() -> None:
    mine, other = run_ranks(_quantised, 2)
    assert mine == other
    assert [kind for kind, _ in mine] == ["StateKeyError", "InvalidValueError"] * 4
    assert "is a Opaque, a tensor class of its own" in mine[0][1]
    assert "is a Quantised, which cannot be written" in mine[1][1]


def test_a_quantised_tensor_of_one_process() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([param])
    optimizer.state[param].update(kept=Quantised(torch.tensor([1, 2, 3]), 0.5), opaque=Opaque(torch.ones(3), 1.0))
    attach(None, optimizer)
    assert_same(safe_get_full_optimizer_state(param, "kept"), torch.tensor([0.5, 1.0, 1.5]))
    with pytest.raises(InvalidValueError, match="is a Quantised, which cannot be written"):
        safe_set_full_optimizer_state(param, torch.zeros(3), "kept")
    with pytest.raises(StateKeyError, match="is a Opaque"):
        safe_get_full_optimizer_state(param, "opaque")


def _optimizer_of_torch(rank: int, name: str, engine: str) -> dict[str, Any] | str:
    """For each state, whether it was read; each is the same on both ranks, and what the optimizer keeps."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model: nn.Module = model_of()
    if engine == "fsdp2":
        fully_shard(model)
    if engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(3, 4) * (rank + 1)).square().mean()
        loss.backward()
        return loss

    try:
        for _ in range(2):
            optimizer.step(closure)  # type: ignore[arg-type]
    except RuntimeError as error:  # some of torch's do not know DTensors
        return str(error)[:20]
    attach(model, optimizer)
    found: dict[str, Any] = {}
    for param, state in list(optimizer.state.items()):
        assert state_keys(param) == sorted(state)
        for key in sorted(state):
            found[key] = error = both_ways(param, key)
            if error is None:
                whole = state[key].full_tensor() if isinstance(state[key], DTensor) else torch.as_tensor(state[key])
                read = safe_get_full_optimizer_state(param, key)
                assert read is not None
                assert_same(read, whole)
                for theirs in from_every_rank(read):
                    assert_same(theirs, read)
    return found


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch(name: str, engine: str) -> None:
    mine, other = run_ranks(_optimizer_of_torch, 2, name, engine)
    assert mine == other
    if isinstance(mine, str):
        assert engine == "fsdp2"
        return
    refused = {key for key, error in mine.items() if error is not None}
    assert all(mine[key][0] == "StateKeyError" for key in refused)
    assert refused == ({"al", "old_dirs", "old_stps", "prev_loss", "ro"} if name == "lbfgs" else set())


def _replicated(rank: int) -> list[Any]:
    model = nn.parallel.DistributedDataParallel(model_of())
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params)
    attach(model, optimizer)
    for param in params:
        optimizer.state[param].update(exp_avg=param.detach() * 2, step=3)
    for param, whole in iter_full(params, "exp_avg"):
        assert_same(whole, param.detach() * 2)  # type: ignore[union-attr]
    found = []
    optimizer.state[params[2]]["exp_avg"] += rank
    found.append(raised(lambda: dict(iter_full(params, "exp_avg"))))
    assert raised(lambda: safe_get_full_optimizer_state(params[1], "exp_avg")) is None
    optimizer.state[params[0]]["step"] += rank
    found.append(both_ways(params[0], "step"))
    if rank:
        del optimizer.state[params[1]]["exp_avg"]
    found.append(both_ways(params[1], "exp_avg"))
    return found


def test_replicated_state_is_compared_over_the_ranks() -> None:
    mine, other = run_ranks(_replicated, 2)
    assert mine == other
    assert [kind for kind, _ in mine] == ["StateKeyError"] * 3
    assert "'exp_avg' of parameter '1.weight' differs over the ranks" in mine[0][1]
    assert mine[2][1].startswith("rank 1: optim_state_key 'exp_avg' is not kept")


def _of_one_owner(rank: int) -> list[Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(model_of())
    params = list(model.parameters())
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.Adagrad)
    attach(model, optimizer)
    for param, state in optimizer.optim.state.items():
        state.update(history=[1], local=torch.tensor(float(rank)), kept=Quantised(torch.ones(param.shape), 0.5))
    found = []
    for param in params:
        assert_same(safe_get_full_optimizer_state(param, "sum"), torch.zeros(param.shape))
        assert_same(safe_get_full_optimizer_state(param, "kept"), torch.full(param.shape, 0.5))
        found.append(float(safe_get_full_optimizer_state(param, "local")))  # type: ignore[arg-type]
        found.append(both_ways(param, "history"))
    return found


def test_state_of_one_owner_is_what_the_owner_has() -> None:
    mine, other = run_ranks(_of_one_owner, 2)
    assert mine == other
    assert set(mine[::2]) == {0.0, 1.0}
    assert all(kind == "StateKeyError" and "is a list" in text for kind, text in mine[1::2])


def _flat_pieces(rank: int) -> list[Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wholes = [param.detach() * 2 for param in model_of().parameters()]
    model = FullyShardedDataParallel(model_of(), use_orig_params=True, device_id=torch.device("cpu"))
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params)
    attach(model, optimizer)
    for param in params:
        if param.numel():
            optimizer.state[param].update(
                mom=param.detach() * 2, step=torch.tensor(3.0), scale=torch.tensor(float(rank)), rows=torch.zeros(77)
            )
    for (_, whole), expected in zip(iter_full(params, "mom"), wholes, strict=True):
        assert_same(whole, expected)
    for param in params:
        assert_same(safe_get_full_optimizer_state(param, "step"), torch.tensor(3.0))
    return [both_ways(param, key) for param in params for key in ("scale", "rows")]


def test_state_of_flat_pieces_is_one_number_an_element_or_refused() -> None:
    mine, other = run_ranks(_flat_pieces, 2)
    assert mine == other
    assert all(kind == "InvalidValueError" and "read it in optimizer.state" in text for kind, text in mine)


def _flat_partition(rank: int) -> list[Any]:
    from ds_fragment import FlatPartition

    partition = FlatPartition(model_of().parameters())
    optimizer = torch.optim.SGD([partition.hp_param])
    attach(None, optimizer)
    optimizer.state[partition.hp_param].update(
        step=torch.tensor(3.0), scale=torch.tensor(float(rank)), rows=torch.zeros(5)
    )
    assert_same(safe_get_full_optimizer_state(partition.params[0], "step"), torch.tensor(3.0))
    dist.barrier()
    return [both_ways(partition.params[0], key) for key in ("scale", "rows")]


def test_state_of_a_flat_partition() -> None:
    mine, other = run_ranks(_flat_partition, 2)
    assert mine == other
    assert [kind for kind, _ in mine] == ["StateKeyError"] * 2
    assert "differs over the ranks" in mine[0][1]
    assert "has shape (5,) for the flat" in mine[1][1]

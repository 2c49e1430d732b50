"""`map_shards`: an elementwise function on the shards of every engine, against the same on dense tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import ds_fragment.api.write as write_module
import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, get_local, iter_full, map_shards
from ds_fragment.engines import adapter_of
from fragment_oracle import assert_same, awkward_values, ragged, raised, set_gradients
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Fn = Callable[[Any, torch.Tensor], torch.Tensor | None]


def clamp(_name: object, shard: torch.Tensor) -> torch.Tensor | None:
    return shard.clamp_(-0.5, 0.5)  # in place, and returned


def scale(_name: object, shard: torch.Tensor) -> torch.Tensor | None:
    return shard * 0.5  # a new tensor


def shift(_name: object, shard: torch.Tensor) -> torch.Tensor | None:
    shard += 1.0  # in place, and nothing returned
    return None


def leave(_name: object, _shard: torch.Tensor) -> torch.Tensor | None:
    return None


FNS: tuple[Fn, ...] = (clamp, scale, shift, leave)


def check(params: Any, what: str = "value") -> None:
    """What each function makes of the shards is what it makes of the whole."""
    for fn in FNS:
        expected = {}
        for name, tensor in iter_full(params, what):
            result = fn(name, tensor.clone()) if fn is not shift else tensor + 1.0
            expected[name] = tensor if result is None else result
        map_shards(params, fn, what)
        for name, tensor in iter_full(params, what):
            assert_same(tensor, expected[name], (fn.__name__, what))


def _flat(rank: int) -> None:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.AdamW([partition.hp_param])
    attach(model, optimizer)
    params = partition.params
    set_gradients(params, seed=0)
    partition.reduce_gradients()
    check(params, "grad")
    optimizer.step()
    for what in ("value", "exp_avg"):
        check(params, what)
    for (_, value), param in zip(iter_full(params), params, strict=True):
        assert_same(param.detach(), value.bfloat16(), "the weights follow")
    map_shards(params, scale, refresh_lp=False)
    stale = [
        param for (_, v), param in zip(iter_full(params), params, strict=True) if not torch.equal(param, v.bfloat16())
    ]
    assert stale
    seen: list[torch.Tensor] = []
    map_shards(params, lambda _, shard: seen.append(shard))  # type: ignore[func-returns-value]
    assert all(shard.dim() == 1 and shard.numel() for shard in seen)
    assert sum(shard.numel() for shard in seen) == sum(get_local(param).numel() for param in params)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_flat_partition(ranks: int) -> None:
    run_ranks(_flat, ranks)


def _fsdp2(rank: int, mixed: bool) -> None:
    model = ragged(fsdp2=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach(model, optimizer)
    data = torch.randn(77, 5, generator=torch.Generator().manual_seed(rank))
    used = [param for name, param in model.named_parameters() if name not in ("frozen", "unused")]
    model(data).sum().backward()
    check(used, "grad")
    optimizer.step()
    check(used, "exp_avg")
    before = model(data)  # leaves the copies gathered
    map_shards(model, lambda name, shard: shard.zero_() if name == "scalar" else None)
    after = model(data)
    assert not torch.equal(before, after), "the next forward gathers the new values"
    check(list(model.named_parameters()))


@pytest.mark.parametrize("mixed", [False, True])
def test_fsdp2_after_a_forward(mixed: bool) -> None:
    run_ranks(_fsdp2, 2, mixed)


def _fsdp1(rank: int) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach(model, optimizer)
    data = torch.randn(4, 5)
    model(data).sum().backward()
    check(model, "grad")
    optimizer.step()
    for what in ("value", "exp_avg_sq"):
        check(model, what)
    model(data)
    map_shards(model, lambda _, shard: shard.zero_())
    assert not model(data).any()


def test_fsdp1() -> None:
    run_ranks(_fsdp1, 2)


def _replicas(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    tensor = torch.randn(5, 3)
    for placements in ([Replicate(), Shard(0)], [Replicate(), Replicate()], [Shard(0), Shard(1)], [Shard(0), Shard(0)]):
        check([nn.Parameter(distribute_tensor(tensor, mesh, placements))])
    torch.manual_seed(0)
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
    attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1))
    ddp(torch.ones(2, 5)).sum().backward()
    for what in ("grad", "value"):
        check(ddp, what)


def test_dtensors_and_replicas() -> None:
    run_ranks(_replicas, 4)


def _bits(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = awkward_values(24).view(8, 3)
    mine = whole.chunk(2)[rank].clone()
    param = nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False))
    for fn in (leave, lambda _, shard: shard, lambda _, shard: shard.clone()):
        map_shards([param], fn)
        assert_same(get_local(param), whole.chunk(2)[rank])


def test_bits_that_fn_leaves_stay() -> None:
    run_ranks(_bits, 2)


def _failures(rank: int, flat: bool) -> list[Any]:
    model = ragged(torch.bfloat16 if flat else torch.float32, fsdp2=not flat)
    partition = FlatPartition(model.parameters()) if flat else fully_shard(model)
    attach(model)
    told = []

    def on_one(result: Any) -> Fn:
        def fn(name: str, shard: torch.Tensor) -> Any:
            if name == "long" and rank == 1:
                if isinstance(result, Exception):
                    raise result
                return result
            return shard.fill_(2.0)

        return fn

    for result in (KeyError("user's"), torch.ones(1), torch.ones(2, 2, dtype=torch.float64), 3):
        map_shards(model, lambda _, shard: shard.fill_(1.0))
        told.append(raised(lambda result=result: map_shards(model, on_one(result))))  # type: ignore[misc]
        named = dict(model.named_parameters())
        tiny = dict(iter_full(model))["tiny"]
        assert tiny.item() == 2.0, "before the failing one"
        if flat:
            assert_same(named["tiny"].detach(), tiny.bfloat16(), "the weights follow all the same")
    calls: list[str] = []
    missing = raised(lambda: map_shards(model, lambda name, _: calls.append(name), "exp_avg"))  # type: ignore[func-returns-value]
    assert missing is not None
    assert missing[0] in ("UnlinkedParameterError", "StateKeyError")
    assert not calls
    assert partition is not None
    return told


@pytest.mark.parametrize("flat", [False, True])
def test_a_failure_on_one_rank_is_everybodys(flat: bool) -> None:
    zero, one = run_ranks(_failures, 2, flat)
    assert zero == one
    kinds = [kind for kind, _ in zero]
    assert kinds == ["FragmentError", *["InvalidValueError"] * 3]
    for _, text in zero:
        assert text.startswith("rank 1: map_shards stopped at parameter 'long'; the parameters before it are changed")
    assert 'fn raised KeyError: "user\'s"' in zero[0][1]
    assert "the result of fn is a int, expected a tensor or None" in zero[3][1]


def _unwritable_on_one(rank: int) -> Any:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    map_shards(model, lambda _, shard: shard.fill_(1.0))
    if rank == 1:
        model.long._hp_mapping.hp_fragment = torch.zeros(1)  # type: ignore[attr-defined]
    before = partition.hp_param.detach().clone()
    told = raised(lambda: map_shards(model, shift))
    assert_same(partition.hp_param.detach(), before, "nothing is changed on any rank")
    return told


def test_nothing_changes_where_one_rank_cannot_write() -> None:
    zero, one = run_ranks(_unwritable_on_one, 2)
    assert zero == one
    assert zero[0] == "FragmentError"


def test_what_is_read_as_a_copy_is_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3))
    kind = type(adapter_of(weight))
    original = kind.local

    def halved(self: Any, param: torch.Tensor, what: str) -> torch.Tensor:
        return original(self, param, what) / 2  # as an engine that keeps it times a loss scale

    def write(self: Any, param: torch.Tensor, what: str, piece: torch.Tensor) -> None:
        param.data.copy_(piece * 2)

    monkeypatch.setattr(kind, "local", halved)
    monkeypatch.setattr(kind, "write", write)
    map_shards([weight], shift)
    assert weight.tolist() == [3.0] * 3
    map_shards([weight], scale)
    assert weight.tolist() == [1.5] * 3


def test_state_that_is_derived_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[weight]["turns"] = 3
    model = nn.ParameterList([weight])
    attach(model, optimizer)
    told = raised(lambda: map_shards(model, shift, "turns"))
    assert told is not None
    assert "is a Python number, which cannot be written" in told[1]
    map_shards(model, scale, "momentum_buffer")
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [0.5] * 3


def test_one_agreement_for_dtensors_and_two_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(write_module, "agree", lambda *args, **_: calls.append(args))
    map_shards([nn.Parameter(torch.ones(3))], scale)
    assert len(calls) == 2
    calls.clear()
    map_shards([], scale)
    assert not dist.is_initialized()

"""Whole engines: `attach`, checkpoints from one stage to another, bulk reads, parameters that are gathered."""

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
from engines import ENV, TIMEOUT, Case, Net, backward, batch, configuration, make_engine, train, trained
from oracles import differing, lp_weights, same, told
from ranks import run_ranks


def values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {str(name): tensor for name, tensor in ds_fragment.iter_full(module, dtype=torch.float32)}


def unattached(rank: int) -> None:
    """ZeRO-1 to 3 are read without `attach`, and so is what BF16_Optimizer holds, which leaves no way to it."""
    for case in (Case("zero1"), Case("zero2", "bf16", offload=True), Case("zero3"), Case("bf16opt", "bf16")):
        engine = make_engine(case)
        train(engine, 0)
        params = trained(engine)
        one_by_one = {name: ours.safe_get_full_fp32_param(param) for name, param in params.items()}
        ds_fragment.attach(engine)
        assert not differing({name: values(engine.module)[name] for name in params}, one_by_one)
        assert ours.safe_get_full_optimizer_state(params["a.bias"], "step") == 1.0
        engine.destroy()
    engine = make_engine(Case("bf16opt", "bf16"))
    param, gradients = engine.module.a.weight, engine.optimizer.fp32_groups_gradients
    backward(engine, 0)
    position = next(i for i, one in enumerate(engine.optimizer.bf16_groups[0]) if one is param)
    assert same(ours.safe_get_full_grad(param), gradients[0][position].view(param.shape))
    engine.destroy()


def attached_twice(rank: int) -> None:
    """`attach` keeps nothing alive and can be called again."""
    for case in (Case("zero1"), Case("zero2", offload=True), Case("zero3"), Case("bf16opt", "bf16")):
        engine = make_engine(case)
        ours_before = sys.getrefcount(engine.optimizer), sys.getrefcount(engine), sys.getrefcount(engine.module)
        ds_fragment.attach(engine)
        values(engine.module)
        ds_fragment.attach(engine)
        assert (
            sys.getrefcount(engine.optimizer),
            sys.getrefcount(engine),
            sys.getrefcount(engine.module),
        ) == ours_before
        assert all(len(param._backward_hooks or {}) <= 1 for param in engine.module.parameters())
        engine.destroy()


def described(rank: int) -> None:
    """Every rank tells the same of where things are, and which part is its own."""
    everywhere = tuple(range(dist.get_world_size()))
    shapes = {name: tuple(param.shape) for name, param in Net().named_parameters()}
    for case in (Case("zero1", "bf16"), Case("zero3", "bf16")):
        engine = make_engine(case)
        ds_fragment.attach(engine)
        table = ds_fragment.describe(engine.module)
        for name, found in {line.name: line for line in table}.items():
            assert found.engine == ("deepspeed zero-3" if case.is_zero3 else "deepspeed zero-1/2")
            assert found.shape == shapes[name]
            assert found.master == ("upcast" if name == "frozen" else "fp32")
            assert found.ranks == (() if name == "frozen" and not case.is_zero3 else everywhere)
            pieces = [fragment for fragment in found.fragments if fragment is not None]
            assert sum(piece.numel for piece in pieces) == torch.Size(found.shape).numel()
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [line.fragments for line in table])
        assert all(other == everyone[0] for other in everyone)
        engine.destroy()


def checkpointed(rank: int, folder: str) -> None:
    """A file that one stage wrote is read by the others, which then compute with it."""
    first = make_engine(Case("zero1", "bf16"))
    train(first, 0)
    ds_fragment.attach(first)
    saved = values(first.module)
    ds_fragment.save_full(first.module, f"{folder}/model.safetensors", bucket_bytes=200)
    first.destroy()
    for case in (
        Case("zero2", "fp16", offload=True),
        Case("bf16opt", "bf16"),
        Case("zero3", "bf16", zero={"stage3_param_persistence_threshold": 40}),
        Case("zero3", "fp32", offload=True, zero_init=True),
    ):
        engine = make_engine(case)
        train(engine, 5)
        ds_fragment.attach(engine)
        ds_fragment.load_full(engine.module, f"{folder}/model.safetensors")
        found = values(engine.module)
        frozen = saved["frozen"].to(case.lp).float()  # has no fp32 value in the engine
        assert not differing(found, {**saved, "frozen": frozen}), str(case)
        lp = {name: tensor.to(case.lp).float() for name, tensor in saved.items()}
        assert not differing(lp_weights(engine), lp), str(case)
        train(engine, 6)
        engine.destroy()


def in_bulk(rank: int) -> None:
    """Small buckets, one receiver, norms on the shards: all agree with one parameter at a time."""
    for case in (Case("zero2", "bf16"), Case("zero3", "fp16"), Case("bf16opt", "bf16")):
        engine = make_engine(case)
        ds_fragment.attach(engine)
        params = trained(engine)
        train(engine, 0)
        backward(engine, 1)
        for what in ("value", "grad", "exp_avg", "step"):
            single = {name: next(iter(ds_fragment.iter_full([(name, p)], what)))[1] for name, p in params.items()}
            small = dict(ds_fragment.iter_full(params.items(), what, bucket_bytes=100))
            assert not differing({str(name): tensor for name, tensor in small.items()}, single), (str(case), what)
            here = dict(ds_fragment.iter_full(params.items(), what, dst=1, dtype=torch.float64))
            assert list(here) == (list(params) if rank == 1 else [])
            norms = ds_fragment.norms(params.items(), what)
            infinite = ds_fragment.norms(params.items(), what, ord=float("inf"))
            for name, tensor in single.items():
                assert norms[name] == pytest.approx(float(tensor.double().norm()), rel=1e-12), (str(case), what, name)
                assert infinite[name] == float(tensor.abs().max())
        engine.destroy()


def gathered(rank: int) -> None:
    """A write reaches a ZeRO-3 parameter that is whole at the moment, whoever wrote, and outlives the context."""
    import deepspeed

    engine = make_engine(Case("zero3", "bf16"))
    ds_fragment.attach(engine)
    param = engine.module.b.weight
    new = torch.linspace(-3.0, 3.0, 77).view(11, 7)
    with deepspeed.zero.GatheredParameters([param]):
        ours.safe_set_full_fp32_param(param, new)
        assert same(param.detach(), new.bfloat16())
        ours.safe_set_local_fp32_param(param, ours.safe_get_local_fp32_param(param) * 2)
        assert same(param.detach(), (2 * new).bfloat16())
    assert same(lp_weights(engine)["b.weight"], (2 * new).bfloat16().float())
    assert same(ours.safe_get_full_fp32_param(param), 2 * new)
    engine.destroy()


def kept_twice(rank: int) -> None:
    """hpZ keeps a second low-precision copy from the forward pass on: a write before the step reaches that as well."""
    engine = make_engine(Case("zero3", "bf16", gas=2, zero={"zero_hpz_partition_size": 2}))
    ds_fragment.attach(engine)
    backward(engine, 0)
    assert engine.module.b.weight.ds_secondary_tensor is not None
    new = {name: torch.full_like(value, 0.3) for name, value in values(engine.module).items() if name != "frozen"}
    ds_fragment.set_many([(param, new[name]) for name, param in trained(engine).items()])
    dense = Net().bfloat16()
    dense.load_state_dict(lp_weights(engine), strict=False)  # the tied name is missing
    inputs = batch(0, 1, rank).bfloat16()
    assert torch.equal(dense.b.weight, torch.full((11, 7), 0.3).bfloat16())
    assert torch.equal(engine(inputs), dense(inputs))
    engine.destroy()


def partitioned_without_an_engine(rank: int) -> None:
    """After `zero.Init` alone the values are there, and nothing else is."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=configuration(Case("zero3", "bf16"))):
        torch.manual_seed(0)
        model = Net()
    param = model.b.weight
    with deepspeed.zero.GatheredParameters([param]):
        expected = param.detach().float().clone()
    assert same(ours.safe_get_full_fp32_param(param).float(), expected)
    assert ds_fragment.describe(param).master == "upcast"
    assert told(lambda: ours.safe_get_full_optimizer_state(param, "step")).startswith("UnlinkedParameterError: rank 0")
    assert "deepspeed.initialize" in told(lambda: ours.safe_get_full_grad(param))


def without_zero(rank: int) -> None:
    """In low precision the engine's fp32 masters are the values, and a write of them lasts."""
    from deepspeed.ops.adam import FusedAdam

    for case, optimizer, refused in (
        (Case("none", "bf16"), torch.optim.AdamW, ""),
        (Case("none", "fp16"), torch.optim.AdamW, "a loss scale of"),
        (Case("none", "bf16", gas=2), torch.optim.AdamW, "gradient_accumulation_steps > 1"),
        (Case("none", "bf16"), FusedAdam, ""),  # whose masters DeepSpeed keeps flat
        (Case("none", "fp16"), FusedAdam, "a loss scale of"),
    ):
        engine = make_engine(case, optimizer)
        ds_fragment.attach(engine)
        train(engine, 0)
        params = trained(engine)
        for name, param in params.items():
            master, state = kept(engine.optimizer)[id(param)]
            assert ds_fragment.describe(param).master == "fp32"
            assert same(ours.safe_get_full_fp32_param(param), master.detach())
            assert set(ds_fragment.state_keys(param)) == set(state) == {"exp_avg", "exp_avg_sq", "step"}
            for key in state:
                assert same(ours.safe_get_full_optimizer_state(param, key), torch.as_tensor(state[key])), (name, key)
        if refused:
            backward(engine, 1)
            text = told(lambda param=params["a.bias"]: ours.safe_get_full_grad(param), replicated=True)
            assert text.startswith("GradientUnavailableError: ")
            assert f"with {refused}" in text
        else:
            reduced_without_zero(engine, params)
        new = {name: torch.full_like(param, 0.5, dtype=torch.float32) for name, param in params.items()}
        ds_fragment.set_many([(param, new[name]) for name, param in params.items()])
        assert not differing({name: param.detach().float() for name, param in params.items()}, new)
        train(engine, 2)
        for param in params.values():  # by a step or two, away from what was written
            assert 0 < (kept(engine.optimizer)[id(param)][0] - 0.5).abs().max() < 0.2
        ours.safe_set_full_optimizer_state(params["b.weight"], torch.full((11, 7), 0.125), "exp_avg")
        assert torch.equal(kept(engine.optimizer)[id(params["b.weight"])][1]["exp_avg"], torch.full((11, 7), 0.125))
        engine.destroy()


def kept(optimizer: Any) -> dict[int, tuple[torch.Tensor, dict[str, Any]]]:
    """By a parameter's id, the engine's own master and state, which DeepSpeed may keep flat for all of a group."""
    found: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}
    for index, params in enumerate(optimizer.fp16_groups):
        if hasattr(optimizer, "fp32_groups"):
            for param, master in zip(params, optimizer.fp32_groups[index], strict=True):
                found[id(param)] = (master, optimizer.optimizer.state[master])
            continue
        flat = optimizer.fp32_groups_flat[index]
        parts = torch._utils._unflatten_dense_tensors(flat, params)
        states: list[dict[str, Any]] = [{} for _ in params]
        for key, entry in optimizer.optimizer.state[flat].items():
            cut = isinstance(entry, torch.Tensor) and entry.shape == flat.shape
            pieces = torch._utils._unflatten_dense_tensors(entry, params) if cut else [entry] * len(params)
            for state, piece in zip(states, pieces, strict=True):
                state[key] = piece
        found.update(zip(map(id, params), zip(parts, states, strict=True), strict=True))
    return found


def reduced_without_zero(engine: Any, params: dict[str, torch.Tensor]) -> None:
    """The mean over the ranks; and one that is written is what the engine steps with."""
    module = engine.module
    loss = module(batch(1, 0, dist.get_rank()).to(next(iter(params.values())).dtype))
    expected = [grad.float() for grad in torch.autograd.grad(loss, list(params.values()))]
    for grad in expected:
        dist.all_reduce(grad)
    backward(engine, 1)
    for grad, param in zip(expected, params.values(), strict=True):
        got = ours.safe_get_full_grad(param)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, grad / dist.get_world_size(), rtol=0.05, atol=1e-3)
    param = params["a.bias"]
    ours.safe_set_full_grad(param, torch.full((7,), 0.25))
    assert torch.equal(ours.safe_get_full_grad(param), torch.full((7,), 0.25))
    before = ours.safe_get_full_optimizer_state(param, "exp_avg")
    engine.step()
    torch.testing.assert_close(ours.safe_get_full_optimizer_state(param, "exp_avg"), before * 0.9 + 0.025)


def everything(rank: int, folder: str) -> None:
    attached_twice(rank)
    unattached(rank)
    described(rank)
    checkpointed(rank, folder)
    in_bulk(rank)
    gathered(rank)
    kept_twice(rank)
    partitioned_without_an_engine(rank)


def test_engines(tmp_path):
    run_ranks(everything, 2, str(tmp_path), env=ENV, timeout=TIMEOUT)


def test_without_zero():
    run_ranks(without_zero, 2, env=ENV, timeout=TIMEOUT)

"""Norms, counts and availability, computed on the shards, against dense float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from ds_fragment import FlatPartition, attach, available, count_nonfinite, iter_full, norms, set_many, total_norm
from ds_fragment.errors import FragmentError, GradientUnavailableError, InvalidValueError
from ds_fragment.tensor_fragment import safe_get_full_grad
from fragment_oracle import assert_same
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(7, 3), "unused": nn.Linear(2, 2)}).bfloat16()


def _against_dense(rank: int, world_size: int) -> dict[str, float]:
    model = _model()
    partition = FlatPartition(model.parameters())
    optimizer = torch.optim.Adam([partition.hp_param])
    attach(model, optimizer)
    model["b"](model["a"](torch.ones(2, 5).bfloat16())).sum().backward()
    partition.reduce_gradients()
    used = available(model)
    assert [name for name, _ in used] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    with pytest.raises(GradientUnavailableError, match="no rank used"):
        norms(model, "grad")
    for what, params in (("value", list(model.named_parameters())), ("grad", used)):
        dense = dict(iter_full(params, what))
        two, largest = norms(params, what), norms(params, what, ord=math.inf)
        for name, tensor in dense.items():
            assert two[name] == pytest.approx(tensor.double().norm().item(), rel=1e-12)
            assert largest[name] == tensor.abs().max().item()
    optimizer.step()
    assert norms(model, "step") == dict.fromkeys(dict(model.named_parameters()), 1.0)
    with torch.no_grad():
        flat = partition.hp_param
        start = rank * partition.partition_size
        for position, value in ((3, math.nan), (4, math.inf), (40, -math.inf)):  # a.weight twice, a.bias or b.weight
            if start <= position < start + partition.partition_size:
                flat[position - start] = value
    counts = count_nonfinite(model)
    dense = dict(iter_full(model))
    assert counts == {name: int((~tensor.isfinite()).sum()) for name, tensor in dense.items()}
    assert sum(counts.values()) == 3
    assert math.isnan(norms(model)["a.weight"])
    assert math.isnan(norms(model, ord=math.inf)["a.weight"])
    return {name: norm for name, norm in norms(used, "value").items() if norm == norm}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_against_dense_float64(world_size: int) -> None:
    found = run_ranks(_against_dense, world_size, world_size)
    assert all(norm == found[0] for norm in found), "the same bits on every rank"


def test_unnamed_parameters_are_the_keys() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    assert norms([weight]) == {weight: 5.0}
    assert available([weight]) == []
    weight.grad = torch.ones(2)
    assert available([weight]) == [weight]


def test_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ord is 1, expected 2 or float\('inf'\)"):
        norms([], ord=1)


_KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex128, torch.complex64, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def _of_every_kind(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A tensor of each dtype, with what is not finite and the least integer where the dtype has them."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for dtype in _KINDS:
        numbers = torch.randn(shape, dtype=torch.float64, generator=generator) * 20
        if dtype.is_complex:
            numbers = torch.complex(numbers, numbers.flip(0) if numbers.dim() else -numbers).conj()
        tensor = numbers.to(dtype) if dtype != torch.uint16 else numbers.abs().to(dtype)
        if len(shape) == 2 and tensor.numel():
            if dtype in (torch.int8, torch.int64):
                tensor[0, 0] = torch.iinfo(dtype).min
            elif dtype.is_floating_point or dtype.is_complex:
                made[f"{dtype} odd"] = tensor.clone()
                made[f"{dtype} odd"].view(-1)[-1] = math.nan
                if dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
                    made[f"{dtype} infinite"] = tensor.clone()
                    made[f"{dtype} infinite"].view(-1)[1] = -math.inf
        made[str(dtype)] = tensor
    return made


def _check_against_dense(named: Iterable[tuple[str, torch.Tensor]], whole: dict[str, torch.Tensor], what: str) -> None:
    two, largest, counts = norms(named, what), norms(named, what, ord=math.inf), count_nonfinite(named, what)
    for name, tensor in whole.items():
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).resolve_conj()
        magnitudes = wide.abs()
        expected = magnitudes.square().sum().sqrt().item()
        assert two[name] == pytest.approx(expected, rel=1e-12, nan_ok=True), name
        assert largest[name] == pytest.approx(magnitudes.max().item() if len(tensor.view(-1)) else 0.0, nan_ok=True)
        assert counts[name] == int((~wide.isfinite()).sum()), name


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("shape", [(7, 3), (), (0, 4), (5,)])
def test_every_kind_of_number_on_one_rank(shape: tuple[int, ...]) -> None:
    whole = _of_every_kind(shape)
    for name, tensor in iter_full(whole.items()):
        assert_same(tensor, whole[str(name)].resolve_conj(), name)
    _check_against_dense(whole.items(), whole, "value")


def _every_kind(rank: int) -> list[float]:
    mesh = init_device_mesh("cpu", (2,))
    whole = {**_of_every_kind((7, 3)), **{f"{n} even": t for n, t in _of_every_kind((8, 2)).items()}}
    cut = {name: _cut(tensor, mesh) for name, tensor in whole.items()}
    for name, tensor in iter_full(cut.items()):
        assert_same(tensor, whole[str(name)].resolve_conj(), name)
    for name, tensor in cut.items():
        assert_same(dict(iter_full({name: tensor}.items()))[name], whole[name].resolve_conj(), name)
    mixed = {**cut, "plain": torch.arange(5, dtype=torch.int8)}
    _check_against_dense(mixed.items(), {**whole, "plain": mixed["plain"]}, "value")
    return [norm for norm in norms(mixed.items()).values() if norm == norm]


def _cut(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """A DTensor cut by rows, made without a collective: gloo does not scatter every dtype."""
    mine = tensor.resolve_conj().chunk(mesh.size())[mesh.get_rank()].clone()
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def test_every_kind_of_number_on_two_ranks() -> None:
    zero, one = run_ranks(_every_kind, 2)
    assert zero == one


def _dense_total(tensors: Iterable[torch.Tensor], ord: float = 2) -> float:
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    return float(flat.norm() if ord == 2 else flat.abs().max())


def _total_beside_torch(rank: int) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model)
    attach(model)
    model(torch.randn(4, 7, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    found = []
    for what in ("value", "grad"):
        dense = [tensor for _, tensor in iter_full(model, what)]
        mine = [param if what == "value" else param.grad for param in model.parameters()]
        for ord in (2, math.inf):
            found.append(total_norm(model, what, ord=ord))
            assert found[-1] == pytest.approx(_dense_total(dense, ord), rel=1e-12)
            beside = torch.nn.utils.get_total_norm(mine, ord).full_tensor()
            assert found[-1] == pytest.approx(beside.item(), rel=1e-5)
    return found


def test_the_norm_of_all_is_torchs_under_fsdp2() -> None:
    zero, one = run_ranks(_total_beside_torch, 2)
    assert zero == one, "the same bits on every rank"


def _total_over_groups(rank: int) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(0)
    wholes = [torch.randn(5, 3) for _ in range(6)]
    cuts = [
        (mesh["a"], [Shard(0)]),
        (mesh["b"], [Shard(1)]),
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh, [Replicate(), Replicate()]),
    ]
    params = [distribute_tensor(whole, *cut) for whole, cut in zip(wholes, cuts, strict=False)]
    params.append(wholes[-1])  # whole on every rank
    for ord in (2, math.inf):
        assert total_norm(params, ord=ord) == pytest.approx(_dense_total(wholes, ord), rel=1e-12)
    if rank % 2:
        params[1].to_local().fill_(math.nan)
    assert math.isnan(total_norm(params))
    assert math.isnan(total_norm(params, ord=math.inf))
    model = _model()
    partition = FlatPartition(model.parameters())
    assert partition.rank == rank
    dense = [tensor for _, tensor in iter_full(model)]
    assert total_norm(model) == pytest.approx(_dense_total(dense), rel=1e-12)
    return total_norm(model)


def test_the_norm_of_all_over_several_groups() -> None:
    assert len(set(run_ranks(_total_over_groups, 4))) == 1


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_the_norm_of_every_kind_together() -> None:
    whole = {name: tensor for name, tensor in _of_every_kind((7, 3)).items() if "odd" not in name}
    finite = {name: tensor for name, tensor in whole.items() if "infinite" not in name}
    wide = [t.to(torch.complex128).abs() if t.is_complex() else t.double() for t in finite.values()]
    for ord in (2, math.inf):
        assert total_norm(finite.items(), ord=ord) == pytest.approx(_dense_total(wide, ord), rel=1e-12)
        assert total_norm(whole.items(), ord=ord) == math.inf
    assert total_norm([]) == 0.0
    with pytest.raises(ValueError, match=r"ord is 3, expected 2 or float\('inf'\)"):
        total_norm([], ord=3)
    huge = torch.full((4,), 3e38)
    assert total_norm([huge]) == norms([huge])[huge] == pytest.approx(6e38)
    assert count_nonfinite([huge])[huge] == 0


def _without_a_norm(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    fine = _cut(torch.ones(4, 2), mesh)
    odd = _cut(torch.ones(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), mesh)
    told = []
    for call in (norms, count_nonfinite, total_norm):
        with pytest.raises(FragmentError) as caught:
            call([("fine", fine), ("odd", odd)])
        told.append(str(caught.value))
    return told


def test_a_kind_without_a_norm_is_named_on_every_rank() -> None:
    zero, one = run_ranks(_without_a_norm, 2)
    assert zero == one
    for text in zero:
        assert "'value' of a parameter of shape (4, 2) is a Tensor of torch.float4_e2m1fn_x2" in text
    with pytest.raises(FragmentError, match="on the meta device and has no data"):
        norms([torch.empty(3, device="meta")])


def _embedding() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(6, 3, sparse=True)


def _sparse(rank: int, ddp: bool) -> None:
    module = _embedding()
    model = nn.parallel.DistributedDataParallel(module) if ddp else module
    optimizer = torch.optim.SparseAdam(module.parameters())
    attach(model, optimizer)
    model(torch.tensor([1, 4, 4])).square().sum().backward()
    weight = module.weight
    assert weight.grad is not None
    assert weight.grad.is_sparse
    dense = _embedding()
    dense.sparse = False
    dense(torch.tensor([1, 4, 4])).square().sum().backward()
    expected = dense.weight.grad
    assert expected is not None
    _check_against_dense({"weight": weight}.items(), {"weight": expected}, "grad")
    for found in (safe_get_full_grad(weight), dict(iter_full(model, "grad"))["weight"]):
        assert found is not None
        assert_same(found, expected)
    with pytest.raises(InvalidValueError, match=r"'grad' of parameter 'weight' is of layout torch\.sparse_coo"):
        set_many([(weight, expected)], "grad")
    optimizer.step()
    assert norms(model, "exp_avg")["weight"] > 0


@pytest.mark.parametrize("ddp", [False, True])
def test_sparse_gradients_are_read_as_dense_ones(ddp: bool) -> None:
    run_ranks(_sparse, 2, ddp)


def _failing_on_one(rank: int) -> str:
    model = _model()
    partition = FlatPartition(model.parameters())
    if rank == 1:
        model["unused"].weight._hp_mapping.hp_fragment = torch.zeros(1)
    with pytest.raises(FragmentError) as caught:
        norms(model)
    assert partition.rank == rank
    return str(caught.value)


def test_a_piece_that_is_missing_on_one_rank_is_everybodys_error() -> None:
    told = run_ranks(_failing_on_one, 2)
    assert told[0] == told[1]
    assert told[0].startswith("rank 1: ")

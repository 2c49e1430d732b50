"""FSDP2 itself as the engine: every quantity bit for bit what `DTensor.full_tensor()` gives, whatever the mesh."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """Uneven everywhere: 7, 5 and 6 rows, a gain of 1, tied embeddings, a frozen layer, one that may be left out."""

    data: int  # which part of the batch is this rank's

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.down = nn.Linear(5, 6)
        self.extra = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, *, extra: bool = True) -> torch.Tensor:
        hidden = self.down(self.frozen(torch.tanh(self.up(self.embed(tokens))))) * self.gain
        return self.head(self.extra(hidden) if extra else hidden)


def shard(mesh_of: str, dtype: torch.dtype | None = torch.bfloat16, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model, ranks = Net(), dist.get_world_size()
    if mesh_of == "one axis":
        mesh = init_device_mesh("cpu", (ranks,))
    elif mesh_of == "hybrid":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "shards"))
    else:  # tensor parallel within, FSDP around: both cut the same dimension of some
        both = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("fsdp", "tp"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        model.up, model.frozen, model.down = nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 6)  # type: ignore[assignment]
        for param in model.parameters():
            dist.broadcast(param.data, 0)
        parallelize_module(model, both["tp"], plan)
        mesh = both["fsdp"]
    model.data = dist.get_rank() // 2 if mesh_of == "tensor parallel" else dist.get_rank()
    return shard_over(mesh, model, dtype)


def shard_over(
    mesh: DeviceMesh, model: Net, dtype: torch.dtype | None = torch.bfloat16, offload: OffloadPolicy | None = None
) -> Net:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (model.up, model.down, model.extra, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload or OffloadPolicy())
    return model


MESHES = [("one axis", 1), ("one axis", 2), ("one axis", 3), ("one axis", 4), ("hybrid", 4), ("tensor parallel", 4)]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def backward(model: Net, turn: int, *, extra: bool = True) -> None:
    generator = torch.Generator().manual_seed(10 * turn + model.data)
    model(torch.randint(0, 7, (4,), generator=generator), extra=extra).float().square().mean().backward()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(-1), other.view(-1))


def _every_quantity(rank: int, mesh_of: str, name: str) -> None:
    import ds_fragment
    from ds_fragment import tensor_fragment as t

    model = shard(mesh_of)
    optimizer = OPTIMIZERS[name](trainable(model))
    ds_fragment.attach(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert "head.weight" not in names  # tied: once
    for turn in range(3):
        optimizer.zero_grad()
        backward(model, turn)
        for (key, got), (theirs, param) in zip(ds_fragment.iter_full(model), model.named_parameters(), strict=True):
            assert key == theirs
            assert same(got, full(param)), (key, param.placements)
            assert same(t.safe_get_full_fp32_param(param), full(param)), key
            assert same(ds_fragment.get_local(param), param.to_local().detach())
        params = trainable(model)
        expected = [full(param.grad) for param in params]  # not beside a bucket under way: see the README on gloo
        for bucket_bytes in (1, 1 << 20):
            gradients = ds_fragment.iter_full(params, "grad", bucket_bytes=bucket_bytes)
            for (param, got), mine, whole in zip(gradients, params, expected, strict=True):
                assert param is mine
                assert got.dtype == torch.float32
                assert same(got, whole), (mine.placements, mine.shape)
        assert same(t.safe_get_full_grad(model.up.weight), full(model.up.weight.grad))
        optimizer.step()
        keys = ds_fragment.state_keys(model.up.weight)
        assert keys == (["exp_avg", "exp_avg_sq", "step"] if name == "adamw" else ["momentum_buffer"])
        for key in keys:
            for (_, got), mine in zip(ds_fragment.iter_full(params, key), params, strict=True):
                assert same(got, full(optimizer.state[mine][key])), (key, mine.placements)
            assert same(t.safe_get_full_optimizer_state(model.gain, key), full(optimizer.state[model.gain][key]))
    received = dict(ds_fragment.iter_full(model, dst=dist.get_world_size() - 1))
    assert list(received) == (names if rank == dist.get_world_size() - 1 else [])
    for key, param in model.named_parameters():
        whole = full(param)  # every rank takes part
        assert key not in received or same(received[key], whole)


@pytest.mark.parametrize(("mesh_of", "ranks"), MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_gradients_and_every_state(mesh_of: str, ranks: int, name: str) -> None:
    run_ranks(_every_quantity, ranks, mesh_of, name)


def full_of_offloaded(tensor: DTensor) -> torch.Tensor:
    """What `DTensor.full_tensor()` gives once the pieces are on the GPUs, where the mesh is."""
    local = tensor.to_local().detach().cuda()
    there = DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return there.full_tensor().cpu()


def _offloaded(rank: int, backend: str, pinned: bool) -> None:
    """Parameters, gradients and state are on the CPU between the passes, and the mesh is of GPUs."""
    import ds_fragment
    from ds_fragment import tensor_fragment as t

    torch.cuda.set_device(rank)
    mesh = DeviceMesh.from_group(dist.new_group(backend=backend), "cuda")
    torch.manual_seed(0)
    model = shard_over(mesh, Net(), offload=CPUOffloadPolicy(pin_memory=pinned))
    model.data = rank
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    ds_fragment.attach(model, optimizer)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)
    params = trainable(model)
    assert all(param.device.type == param.grad.device.type == "cpu" for param in params)
    expected = {
        "value": [full_of_offloaded(param) for param in params],
        "grad": [full_of_offloaded(param.grad) for param in params],
        "exp_avg": [full_of_offloaded(optimizer.state[param]["exp_avg"]) for param in params],
    }
    for what, wholes in expected.items():
        for options in ({}, {"bucket_bytes": 1}, {"bucket_bytes": 200}, {"device": "cuda"}):
            for (_, got), whole in zip(ds_fragment.iter_full(params, what, **options), wholes, strict=True):
                assert got.device.type == options.get("device", "cpu")
                assert same(got.cpu(), whole), (what, options)
    assert same(t.safe_get_full_grad(params[1]), expected["grad"][1])
    received = [got for _, got in ds_fragment.iter_full(params, dst=1)]
    assert len(received) == (len(params) if rank == 1 else 0)
    assert all(map(same, received, expected["value"]))
    norms = ds_fragment.norms(params, "grad")
    assert list(norms.values()) == pytest.approx([whole.double().norm().item() for whole in expected["grad"]])
    generator = torch.Generator().manual_seed(5)
    for device in ("cpu", "cuda"):  # where what is written comes from
        new = [torch.randn(param.shape, generator=generator) for param in params]
        ds_fragment.set_many([(param, value.to(device)) for param, value in zip(params, new, strict=True)])
        ds_fragment.update_many(params, lambda _, whole: whole / 2, "exp_avg")
        for param, value in zip(params, new, strict=True):
            assert same(full_of_offloaded(param), value)
    for param, whole in zip(params, expected["exp_avg"], strict=True):
        assert same(full_of_offloaded(optimizer.state[param]["exp_avg"]), whole / 4)
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_offloaded_to_the_cpu(backend: str, pinned: bool) -> None:
    run_ranks(_offloaded, 2, backend, pinned)


def write_by_hand(target: torch.Tensor, value: torch.Tensor) -> None:
    """What a user of DTensor does without ds-fragment."""
    with torch.no_grad():
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements))


def _writes_are_followed(rank: int, mesh_of: str) -> None:
    """Two runs alike: one is written to through ds-fragment, the other by hand; they stay equal, bit for bit."""
    import ds_fragment
    from ds_fragment import tensor_fragment as t

    strided = mesh_of == "tensor parallel"  # distribute_tensor cannot make the placements of FSDP over TP: go through
    mine, other = shard(mesh_of), shard(mesh_of)  # the local tensors that this rank's value gives
    optimizers = [torch.optim.AdamW(trainable(model), lr=0.01) for model in (mine, other)]
    ds_fragment.attach(mine, optimizers[0])
    generator = torch.Generator().manual_seed(5)
    for turn in range(4):
        for model, optimizer in zip((mine, other), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, turn)
        params, others = trainable(mine), trainable(other)
        value = torch.randn(params[1].shape, generator=generator)
        gradient = torch.randn(params[2].shape, generator=generator)
        if strided:
            ds_fragment.set_many([(params[1], value)])
            ds_fragment.set_many([(params[2], gradient)], "grad")
            assert same(full(params[1]), value)
            assert same(full(params[2].grad), gradient)
            with torch.no_grad():
                others[1].to_local().copy_(params[1].to_local())
                others[2].grad.to_local().copy_(params[2].grad.to_local())
        else:
            t.safe_set_full_fp32_param(params[1], value)
            t.safe_set_full_grad(params[2], gradient)
            write_by_hand(others[1], value)
            write_by_hand(others[2].grad, gradient)
        ds_fragment.update_many(params, lambda _, grad: grad * 0.5, "grad")
        for param in others:
            param.grad.mul_(0.5)
        for optimizer in optimizers:
            optimizer.step()
        moment = torch.rand(params[0].shape, generator=generator)
        t.safe_set_full_optimizer_state(params[0], moment, "exp_avg_sq")
        write_by_hand(optimizers[1].state[others[0]]["exp_avg_sq"], moment)
        t.safe_set_full_optimizer_state(params[0], torch.tensor(turn + 5.0), "step")
        optimizers[1].state[others[0]]["step"].fill_(turn + 5.0)
        for one, two in zip(params, others, strict=True):
            assert same(full(one), full(two)), (turn, one.placements, one.shape)
            assert same(ds_fragment.get_local(one), two.to_local().detach())
    assert same(full(mine.frozen.weight), full(other.frozen.weight)) if not strided else True


@pytest.mark.parametrize(("mesh_of", "ranks"), [("one axis", 3), ("hybrid", 4), ("tensor parallel", 4)])
def test_training_goes_on_from_what_was_written(mesh_of: str, ranks: int) -> None:
    run_ranks(_writes_are_followed, ranks, mesh_of)


def _replicas_stay_equal(rank: int) -> None:
    """A write reaches all rows of replicas; one that differs between the rows reaches none."""
    import ds_fragment
    from ds_fragment.errors import InvalidValueError, RankMismatchError

    model = shard("hybrid")
    weight = model.down.weight
    before = weight.to_local().detach().clone()
    row = rank // 2
    for value, kind in (
        (torch.full((6, 5), float(row)), RankMismatchError),
        (torch.ones(5 + row, 5), InvalidValueError),
    ):
        with pytest.raises(kind):
            ds_fragment.set_many([(weight, value)])
        assert torch.equal(weight.to_local(), before)

    def fails_in_one_row(_: object, whole: torch.Tensor) -> torch.Tensor:
        return whole / 2 if rank < 3 else whole[:1]

    with pytest.raises(InvalidValueError, match=r"rank 3: .* has shape \(1, 5\)"):
        ds_fragment.update_many([weight], fails_in_one_row)
    assert torch.equal(weight.to_local(), before)
    ds_fragment.set_many([(weight, torch.ones(6, 5))])
    assert torch.equal(full(weight), torch.ones(6, 5))


def test_replicas_stay_equal() -> None:
    run_ranks(_replicas_stay_equal, 4)


def _stages_of_a_gradient(rank: int) -> list[tuple[str, str]]:
    import ds_fragment
    from ds_fragment.errors import FragmentError
    from ds_fragment.tensor_fragment import safe_get_full_grad

    model = shard("one axis")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    ds_fragment.attach(model, optimizer)
    told = []

    def ask(param: torch.Tensor) -> None:
        try:
            found = safe_get_full_grad(param)
            told.append(("", "there is one") if found is not None else ("None", "there is none"))
        except FragmentError as error:
            told.append((type(error).__name__, str(error)))

    ask(model.up.weight)  # before any backward pass
    backward(model, 0, extra=False)
    ask(model.up.weight)
    ask(model.extra.weight)  # left out of this pass
    optimizer.zero_grad()
    model.set_requires_gradient_sync(False)
    backward(model, 1)
    ask(model.up.weight)  # accumulated on each rank, unreduced
    model.set_requires_gradient_sync(True)
    backward(model, 2)
    ask(model.up.weight)
    assert same(safe_get_full_grad(model.up.weight), full(model.up.weight.grad))
    optimizer.zero_grad()
    ask(model.up.weight)
    ask(model.frozen.weight)
    return told


def test_the_stages_of_a_gradient() -> None:
    mine, other = run_ranks(_stages_of_a_gradient, 2)
    assert mine == other
    kinds = [kind for kind, _ in mine]
    missing = "GradientUnavailableError"
    assert kinds == [missing, "", "None", missing, "", missing, "None"]
    assert "set_requires_gradient_sync(False)" in mine[3][1]


def _reduced_in_part(rank: int) -> str:
    """Between replicas the gradients are summed at the last pass only."""
    import ds_fragment
    from ds_fragment.errors import GradientUnavailableError
    from ds_fragment.tensor_fragment import safe_get_full_grad

    model = shard("hybrid")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    ds_fragment.attach(model, optimizer)
    model.set_requires_all_reduce(False)
    backward(model, 0)
    with pytest.raises(GradientUnavailableError) as caught:
        safe_get_full_grad(model.up.weight)
    model.set_requires_all_reduce(True)
    backward(model, 1)
    assert same(safe_get_full_grad(model.up.weight), full(model.up.weight.grad))
    return str(caught.value)


def test_a_gradient_that_is_reduced_within_the_shard_group_only_is_refused() -> None:
    said = run_ranks(_reduced_in_part, 4)
    assert [words.split(":")[0] for words in said] == ["rank 0", "rank 0", "rank 2", "rank 2"]  # of each shard group
    assert all("set_requires_all_reduce(False)" in words for words in said)


def _without_the_module(rank: int) -> None:
    """A parameter that outlives its module keeps its gradient."""
    import ds_fragment
    from ds_fragment.tensor_fragment import safe_get_full_grad

    model = shard("one axis")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    ds_fragment.attach(model, optimizer)
    backward(model, 0)
    weight, gone = model.up.weight, weakref.ref(model)
    expected = full(weight.grad)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert same(safe_get_full_grad(weight), expected)


def test_a_gradient_outlives_the_module() -> None:
    run_ranks(_without_the_module, 2)


def _between_the_passes(rank: int) -> None:
    """While the parameters are gathered in bf16, the fp32 shards are what is read."""
    import ds_fragment

    model = shard("one axis")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    ds_fragment.attach(model, optimizer)
    expected = {name: full(param).clone() for name, param in model.named_parameters()}
    assert all(whole.dtype == torch.float32 for whole in expected.values())
    output = model(torch.zeros(2, dtype=torch.int64)).float().sum()
    for name, got in ds_fragment.iter_full(model):
        assert same(got, expected[name]), name
    output.backward()
    assert set(dict(ds_fragment.iter_full(model))) == set(expected)


def test_between_forward_and_backward() -> None:
    run_ranks(_between_the_passes, 2)


def _tied(rank: int) -> None:
    import ds_fragment

    model = shard("one axis")
    assert model.head.weight is model.embed.weight
    ds_fragment.attach(model)
    value = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    ds_fragment.set_many([(model.head.weight, value)])
    assert same(full(model.embed.weight), value)
    seen = []
    ds_fragment.update_many(model, lambda name, whole: seen.append(name))
    assert seen.count("embed.weight") == 1
    assert "head.weight" not in seen


def test_tied_weights_are_one() -> None:
    run_ranks(_tied, 3)


def _partial(rank: int) -> str:
    import ds_fragment
    from ds_fragment.errors import InvalidValueError

    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(InvalidValueError) as caught:
        list(ds_fragment.iter_full([partial]))
    for placements in ([Replicate()], [Shard(0)]):
        ((_, got),) = ds_fragment.iter_full([partial.redistribute(mesh, placements)])
        assert got.tolist() == [2, 2, 2]
    return str(caught.value)


def test_a_partial_sum_is_refused() -> None:
    for text in run_ranks(_partial, 2):
        assert "partial sum: redistribute it to Shard or Replicate first" in text

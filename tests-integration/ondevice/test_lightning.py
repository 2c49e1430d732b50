"""What Lightning Fabric makes of models that were built on meta: the values of eager construction, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy

import torch
from ds_ondevice import OnDevice, is_deferred, materialize
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("inv_freq", 1 / torch.arange(1, 4).float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden * self.inv_freq.sum())


def eager(*blocks: Callable[[], Any]) -> Net:
    torch.manual_seed(3)
    with ExitStack() as stack:
        for block in blocks:  # made one after the other: Fabric enters its own where it makes it
            stack.enter_context(block())
        return Net()


def on_meta() -> Net:
    with OnDevice(torch.float32, device="meta"):
        return Net()


def restored(model: Any) -> Any:
    torch.manual_seed(3)
    assert materialize(model, "cpu").missing == ()
    return model


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    buffers = zip(found.named_buffers(), expected.buffers(), strict=True)
    for (name, ours), theirs in (*pairs, *buffers):
        if isinstance(ours, torch.distributed.tensor.DTensor):
            ours = ours.full_tensor()
        else:
            assert type(ours) is type(theirs), name
        assert ours.dtype is theirs.dtype, name
        assert torch.equal(ours, theirs), name


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def steps(model: Any, optimizer: Any, backward: Callable[..., None] = torch.Tensor.backward) -> list[float]:
    losses = []
    for _ in range(2):
        losses.append(model(torch.arange(8).view(2, 4)).square().mean())
        backward(losses[-1])
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_init_module_around_and_inside_a_block(device: str, precision: Any) -> None:
    ours = partial(OnDevice, torch.float32, device)
    theirs = partial(Fabric(accelerator="cpu", devices=1, precision=precision).init_module, empty_init=False)
    around, inside = eager(theirs, ours), eager(ours, theirs)
    assert is_deferred(around) == (device == "meta")
    assert_same(restored(around), eager())  # the block wins, which is the inner one
    assert not is_deferred(inside)  # Fabric's device is as explicit as an argument
    assert_same(inside, eager(theirs))


def test_parameters_that_fabric_left_empty_are_named() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = on_meta()
    report = materialize(model, "cpu")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert list(report.uninitialized) == names
    assert all(parameter.isnan().all() for parameter in model.parameters())
    assert torch.equal(model.inv_freq, eager().inv_freq)
    model.load_state_dict(eager().state_dict())
    assert_same(model, eager())


def test_setup_of_one_process() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        fabric.setup(on_meta())
    expected = eager()
    losses = steps(expected, sgd(expected))
    early, late = on_meta(), on_meta()
    model, optimizer = fabric.setup(restored(early), sgd(early))
    assert steps(model, optimizer, fabric.backward) == losses
    model, optimizer = fabric.setup(late, sgd(late), move_to_device=False)
    assert steps(restored(model), optimizer, fabric.backward) == losses
    assert_same(model, expected)
    assert_same(late, expected)


def set_up(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def shard(model: Any, mesh: Any) -> Any:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    def fabric_with(strategy: Any) -> Any:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        return fabric

    def model_parallel(parallelize: Any) -> Any:
        return fabric_with(ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1))

    expected = eager()
    losses = steps(expected, sgd(expected))
    whole = eager()
    fabric = model_parallel(shard)
    with OnDevice(torch.float32, device="meta"):
        inside = shard(Net(), fabric.strategy.device_mesh)
    assert_same(restored(inside), whole)
    before = fabric.setup(restored(on_meta()))
    fabric = model_parallel(lambda model, mesh: restored(shard(model, mesh)))
    with fabric.init_module(empty_init=False):
        model = on_meta()
    during = fabric.setup(model)
    for model in (before, during):
        assert_same(model, whole)
        assert steps(model, fabric.setup_optimizers(sgd(model)), fabric.backward) == losses
        assert_same(model, expected)

    # What Fabric does by itself where nobody materialized: no value is right, but all are real and of plain classes.
    fabric = model_parallel(shard)
    with fabric.init_module(empty_init=True):
        model = on_meta()
    model = fabric.setup(model)
    assert {type(parameter).__name__ for parameter in model.parameters()} == {"DTensor"}
    assert {type(parameter.to_local()) for parameter in model.parameters()} == {torch.Tensor}
    assert not any(parameter.is_meta or parameter.to_local().isnan().any() for parameter in model.parameters())
    assert {type(buffer) for buffer in model.buffers()} == {torch.Tensor}

    ddp = fabric_with("ddp")
    model = restored(on_meta())
    model, optimizer = ddp.setup(model, sgd(model))
    assert steps(model, optimizer, ddp.backward) == losses
    with pytest.raises(ValueError, match="only available on GPU"):
        fabric_with(FSDPStrategy())


def test_setup_of_two_ranks() -> None:
    run_ranks(set_up, 2, env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})

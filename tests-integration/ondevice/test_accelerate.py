"""What accelerate makes of models that were built on meta: the values of eager construction, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    accelerate: Any = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, set_module_tensor_to_device

import torch
from ds_ondevice import OnDevice, UnrestorableError, is_deferred, materialize
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate's own
TOKENS = torch.arange(8).view(2, 4)


class Net(nn.Module):
    def __init__(self, statistics: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))
        self.norm = nn.BatchNorm1d(4, track_running_stats=statistics)
        self.head = nn.Linear(6, 11, bias=False)
        self.tie_weights()
        self.register_buffer("inv_freq", 1 / torch.arange(1, 4).float(), persistent=False)

    def tie_weights(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(self.norm(hidden) * self.inv_freq.sum())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def eager(statistics: bool = True) -> Net:
    torch.manual_seed(3)
    return Net(statistics)


def on_meta(**options: Any) -> Net:
    with OnDevice(torch.float32, device="meta", **options):
        return Net()


def restored(model: Net) -> Net:
    torch.manual_seed(3)
    assert materialize(model, "cpu").missing == ()
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert type(ours[name]) is type(tensor), name
        assert not ours[name].is_meta, name
        assert torch.equal(ours[name], tensor), name
    assert ours["head.weight"].data_ptr() == ours["embedding.weight"].data_ptr()


def steps(model: nn.Module, optimizer: Any, backward: Any = torch.Tensor.backward) -> list[float]:
    losses = []
    for _ in range(2):
        losses.append(model(TOKENS).square().mean())
        backward(losses[-1])
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("order", ["around", "inside"])
@pytest.mark.parametrize("include_buffers", [False, True])
def test_init_empty_weights(include_buffers: bool, order: str, device: str) -> None:
    blocks = [accelerate.init_empty_weights(include_buffers=include_buffers), OnDevice(torch.float32, device)]
    torch.manual_seed(3)
    with ExitStack() as stack:
        for block in blocks if order == "around" else blocks[::-1]:
            stack.enter_context(block)
        model = Net()
    if device == "cpu" and is_deferred(model):  # accelerate put there what nobody recorded
        with pytest.raises(UnrestorableError) as error:
            materialize(model, "cpu")
        assert set(error.value.reasons) == {name for name, tensor in tensors(model).items() if tensor.is_meta}
    else:
        assert_same(restored(model), eager())


def test_device_map_is_that_of_a_model_of_init_empty_weights() -> None:
    with accelerate.init_empty_weights(include_buffers=True):
        plain = Net()
    for memory in ({"cpu": 10**9}, {"cpu": 900, "disk": 10**9}):
        assert accelerate.infer_auto_device_map(on_meta(), memory) == accelerate.infer_auto_device_map(plain, memory)


def test_load_checkpoint_and_dispatch(tmp_path: Path) -> None:
    expected, saved = Net().eval(), str(tmp_path / "weights.bin")
    torch.save(expected.state_dict(), saved)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # inv_freq is in no checkpoint
        accelerate.load_checkpoint_and_dispatch(on_meta(), saved, {"": "cpu"})
    model = on_meta()
    accelerate.load_checkpoint_in_model(model, saved, {"": "cpu"})
    assert [name for name, tensor in tensors(model).items() if tensor.is_meta] == ["inv_freq"]
    assert_same(restored(model), expected)
    model = accelerate.load_checkpoint_and_dispatch(on_meta(include_buffers=False), saved, {"": "cpu"})
    assert_same(model, expected)
    model = on_meta(include_buffers=False).eval()
    places = dict.fromkeys(["embedding", "layers.1", "norm", "head", "inv_freq"], "cpu") | {"layers.0": "disk"}
    accelerate.load_checkpoint_and_dispatch(model, saved, places, offload_folder=tmp_path / "offload")
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert torch.equal(model(TOKENS), expected(TOKENS))


def test_tensors_that_were_set_are_kept() -> None:
    model, expected = on_meta(), eager()
    with pytest.raises(ValueError, match="we need a `value`"):
        set_module_tensor_to_device(model, "layers.0.0.weight", "cpu")
    for name in ("layers.0.0.weight", "norm.running_mean"):
        value = torch.full_like(expected.state_dict()[name], 2.0)
        set_module_tensor_to_device(model, name, "cpu", value=value)
        expected.state_dict()[name].copy_(value)
    assert_same(restored(model), expected)


def test_dispatch_model() -> None:
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        accelerate.dispatch_model(on_meta(), {"": "cpu"})
    model, expected = restored(on_meta()).eval(), eager().eval()
    accelerate.dispatch_model(model, {name: "cpu" for name, _ in model.named_children()}, "cpu", force_hooks=True)
    assert_same(model, expected)
    assert torch.equal(model(TOKENS), expected(TOKENS))


def test_prepare_trains_as_eager() -> None:
    accelerator, model, expected = accelerate.Accelerator(cpu=True), on_meta(), eager()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        accelerator.prepare(on_meta())
    optimizer = sgd(model)  # made before there are values
    model, optimizer = accelerator.prepare(restored(model), optimizer)
    assert steps(model, optimizer, accelerator.backward) == steps(expected, sgd(expected))
    assert_same(model, expected)


def prepared(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for how in ("ddp", "fsdp2", "fsdp2 saving memory", "fsdp2 sharded inside"):
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="no_wrap" if how == "fsdp2 sharded inside" else "transformer_based_wrap",
            transformer_cls_names_to_wrap=["Sequential"],
            cpu_ram_efficient_loading=how == "fsdp2 saving memory",
        )
        AcceleratorState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True)
        if how != "ddp":  # accelerate takes FSDP2 on GPUs only, by itself
            accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        with OnDevice(torch.float32, device="meta"):
            model = Net(statistics=False)  # to save memory, accelerate takes every persistent buffer for a DTensor
            for part in (*model.layers, model) if how == "fsdp2 sharded inside" else ():
                fully_shard(part)
        expected, optimizer = eager(statistics=False), sgd(model)
        made, optimizer = accelerator.prepare(restored(model), optimizer)
        for (name, ours), theirs in zip(made.named_parameters(), expected.parameters(), strict=True):
            assert type(ours) is nn.Parameter or how != "ddp"
            assert torch.equal(ours if how == "ddp" else ours.full_tensor(), theirs), (how, name)
        assert torch.equal(model.inv_freq, expected.inv_freq)
        torch.testing.assert_close(steps(made, optimizer, accelerator.backward), steps(expected, sgd(expected)))


def test_prepare_on_two_ranks_trains_as_eager() -> None:
    run_ranks(prepared, 2, env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})

"""Names are as the user wrote them, whatever wraps the model or a part; the oracle is the model before that.

The wrappers are the real ones of torch, accelerate, Lightning, DeepSpeed and peft; Megatron's and apex's stand-ins.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment.engines.model import own_buffers, own_modules, own_parameters, unwrapped, unwrapped_names
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own

ENV = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "4",
}
TIMEOUT = 280.0  # the first start on a machine compiles DeepSpeed's communication operator
Wrap = Callable[[Any], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)  # as a wrapper would call it
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.module(x))


class Net(nn.Module):
    """Parts that are called as wrappers call theirs, a tied weight, buffers, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.module.weight
        self.register_buffer("n_averaged", torch.arange(3.0))
        self.register_buffer("left_out", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.module(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def layers(wrap: Wrap) -> Wrap:
    """Wrap each block of the model."""

    def wrapped(net: Net) -> Net:
        for i, layer in enumerate(net.layers):
            net.layers[i] = wrap(layer)
        return net

    return wrapped


def chain(*wraps: Wrap) -> Wrap:
    """The first is the innermost."""

    def wrapped(net: Any) -> Any:
        for wrap in wraps:
            net = wrap(net)
        return net

    return wrapped


def compiled(net: Any) -> Any:
    return torch.compile(net, backend="eager")


def ddp(net: Any) -> Any:
    return DistributedDataParallel(net)


def fsdp1(net: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(net, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(net: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for module in list(net.modules()):
        if type(module) is Block:
            fully_shard(module)
    return fully_shard(net)


def stage(net: Any) -> Any:
    from torch.distributed.pipelining import PipelineStage

    return PipelineStage(net, dist.get_rank(), 2, torch.device("cpu"))


def lora(net: Net) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(net, LoraConfig(r=2, target_modules=["head"]))  # type: ignore[arg-type]


def prepared(net: Any, **options: Any) -> Any:
    import accelerate
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **options).prepare(net)


def prepared_by_regions(net: Any) -> Any:
    from accelerate.utils import TorchDynamoPlugin

    return prepared(net, dynamo_plugin=TorchDynamoPlugin(backend="eager", use_regional_compilation=True))


def regions(net: Any) -> Any:
    from accelerate.utils import compile_regions

    return compile_regions(net, backend="eager")


def fabric(strategy: Any, call: str = "setup") -> Wrap:
    def wrapped(net: Any) -> Any:
        from lightning.fabric import Fabric

        made = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        made.launch()
        return getattr(made, call)(net)

    return wrapped


def fabric_fsdp2(net: Any) -> Any:
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(lambda net, mesh: fsdp2(net), data_parallel_size=2, tensor_parallel_size=1)
    return fabric(strategy)(net)


def trainer(net: Net) -> Any:
    """What Lightning's trainer with DDP makes of a LightningModule, whose part the net is."""
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(batch).sum()
            return out

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    runner = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    kept: list[Any] = []

    class Keep(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            kept.append(trainer.strategy.model)

    runner.callbacks.append(Keep())
    runner.fit(Lit(), torch.utils.data.DataLoader(torch.randn(4, 4), batch_size=2))
    assert isinstance(kept[0], DistributedDataParallel)
    return kept[0]


def engine(zero: int) -> Wrap:
    def wrapped(net: Net) -> Any:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": zero},
        }
        return deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=config)[0]

    return wrapped


def fabric_module(net: Any) -> Any:
    """What Fabric's DeepSpeedStrategy, which refuses CPUs, makes of an engine."""
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricModule

    return _FabricModule(net, SingleDeviceStrategy(torch.device("cpu")), unwrapped(net))


# By client, which share a launch: what wraps, and the prefix that the user's own model has before the names of `Net`.
CASES: dict[str, dict[str, Wrap]] = {
    "torch": {
        "nothing": chain(),
        "ddp": ddp,
        "data parallel": nn.DataParallel,
        "averaged": AveragedModel,
        "averaged ddp of compiled": chain(compiled, ddp, AveragedModel),
        "compiled": compiled,
        "compiled ddp": chain(ddp, compiled),
        "ddp of compiled": chain(compiled, ddp),
        "compiled layers": layers(compiled),
        "ddp of compiled layers": chain(layers(compiled), ddp),
        "ddp layers": layers(ddp),
        "compiled ddp layers": layers(chain(ddp, compiled)),
        "recomputing": checkpoint_wrapper,
        "recomputing layers": layers(checkpoint_wrapper),
        "offloaded compiled layers": layers(chain(compiled, offload_wrapper)),
        "fsdp1": fsdp1,
        "fsdp1 of recomputing layers": chain(layers(checkpoint_wrapper), fsdp1),
        "compiled fsdp1": chain(fsdp1, compiled),
        "fsdp2": fsdp2,
        "compiled fsdp2 of recomputing layers": chain(layers(checkpoint_wrapper), fsdp2, compiled),
        "stage": stage,
        "stage of ddp": chain(ddp, stage),
    },
    "accelerate": {
        "prepared": prepared,
        "prepared compiled": lambda net: prepared(net, dynamo_backend="eager"),
        "prepared by regions": prepared_by_regions,
        "regions": regions,
        "ddp of regions": chain(regions, ddp),
    },
    "fabric": {
        "ddp": fabric("ddp"),
        "ddp module": fabric("ddp", "setup_module"),
        "ddp of compiled": chain(compiled, fabric("ddp")),
        "ddp of recomputing layers": chain(layers(checkpoint_wrapper), fabric("ddp")),
        "fsdp2": fabric_fsdp2,
        "compiled": chain(fabric("ddp"), compiled),
    },
    "trainer": {"ddp": trainer},
    "deepspeed": {
        **{f"zero{i}": engine(i) for i in (0, 1, 3)},
        "compiled zero2": chain(engine(2), compiled),
        "zero2 of recomputing layers": chain(layers(checkpoint_wrapper), engine(2)),
        "fabric zero3": chain(engine(3), fabric_module),
        "compiled fabric zero1": chain(engine(1), fabric_module, compiled),
    },
}


def check(wrap: Wrap, prefix: str, path: Path) -> None:
    import ds_fragment
    from safetensors import safe_open

    net = Net()
    every = [prefix + name for name, _ in net.named_parameters(remove_duplicate=False)]
    once = [prefix + name for name, _ in net.named_parameters()]
    state = [prefix + name for name in net.state_dict()]
    buffers = [name for name in state if name not in every]
    model = wrap(net)
    ds_fragment.attach(model)
    ordered = sorted if any(hasattr(module, "_handle") for module in unwrapped(model).modules()) else list  # FSDP1
    assert ordered(name for name, _ in own_parameters(model)) == ordered(once)
    assert ordered(name for name, _ in own_parameters(model, remove_duplicate=False)) == ordered(every)
    assert [name for name, _ in own_buffers(model)] == buffers
    assert ordered(name for name, _ in ds_fragment.iter_full(model)) == ordered(once)
    ds_fragment.save_full(model, path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {*once, *buffers}
    ds_fragment.load_full(model, path)
    ds_fragment.set_many([(once[0], torch.full((4, 4), 0.5))], model=model)
    assert (next(iter(dict(ds_fragment.iter_full(model)).values())) == 0.5).all()


def launched(rank: int, client: str, folder: str) -> dict[str, str]:
    warnings.simplefilter("ignore")
    told = {}
    for name, wrap in CASES[client].items():
        try:
            check(wrap, "net." if client == "trainer" else "", Path(folder, f"{name}.safetensors"))
        except Exception:
            told[name] = traceback.format_exc()
        torch._dynamo.reset()
        if dist.is_initialized():
            dist.barrier()
    return told


@pytest.mark.parametrize("client", CASES)
def test_names_are_the_users(client: str, tmp_path: Path) -> None:
    own = client == "trainer"  # it makes the process group
    env = {**ENV, "MASTER_PORT": str(_free_port())} if own else ENV
    for told in run_ranks(launched, 2, client, str(tmp_path), timeout=TIMEOUT, env=env, init=not own):
        assert not told, "\n".join(f"{name}:\n{error}" for name, error in told.items())


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_pefts_own_names_are_kept() -> None:
    names = [name for name, _ in lora(Net()).named_parameters()]
    assert names[0].startswith("base_model.model.")
    assert [name for name, _ in own_parameters(nn.DataParallel(compiled(lora(Net()))))] == names


@pytest.mark.parametrize(
    ("package", "kind"),
    [
        ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel"),
        ("megatron.core.transformer.module", "Float16Module"),
        ("apex.parallel.distributed", "DistributedDataParallel"),
    ],
)
def test_wrappers_that_are_not_installed(package: str, kind: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.module = net
            self.scale = nn.Parameter(torch.ones(1))  # its own, which is not the model's

    names = [name for name, _ in Net().named_parameters()]
    assert names != [name for name, _ in own_parameters(Wrapper(Net()))]
    known = type(kind, (Wrapper,), {"__module__": package})
    mine = type("Mine", (known,), {})
    for wrapper in (known, mine):
        assert [name for name, _ in own_parameters(nn.DataParallel(wrapper(Net())))] == names


def test_names_of_wrappers_are_kept_where_there_is_none() -> None:
    parts = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "submod")
    net = nn.ModuleDict({part: nn.ModuleDict({part: Block()}) for part in parts})
    names = [name for name, _ in net.named_parameters()]
    for model in (net, compiled(net), nn.DataParallel(compiled(net))):
        assert [name for name, _ in own_parameters(model)] == names
        assert [name for name, _ in own_modules(model)] == [name for name, _ in net.named_modules()]


def test_what_a_wrapper_inside_of_the_model_has_is_the_models() -> None:
    net = nn.ModuleDict({"net": nn.Linear(2, 2), "average": AveragedModel(nn.BatchNorm1d(2))})
    names = {"running_mean", "running_var", "num_batches_tracked", "n_averaged"}
    assert {name for name, _ in own_buffers(net)} == {f"average.{name}" for name in names}
    assert [name for name, _ in own_buffers(AveragedModel(nn.Linear(2, 2)))] == []


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, chain(nn.DataParallel, compiled), AveragedModel])
def test_a_files_names_lead_to_the_users(wrap: Wrap) -> None:
    own = set(Net().state_dict())
    for name in wrap(Net()).state_dict():
        found = [found for found in unwrapped_names(name) if found in own]
        assert len(found) == 1
        assert f".{name}".endswith(f".{found[0]}")

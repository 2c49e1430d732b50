"""The engines that ship, as the conformance kit knows them: small, on gloo, one entry of `ENGINES` each."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ds_fragment import FlatPartition
from ds_fragment.testing import Engine, Net, Training, adam, net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

ENGINES: dict[str, Engine] = {}
BF16 = {"compute": torch.bfloat16, "tolerance": 0.05}


def _add(name: str, build: Callable[..., Training], /, *args: Any, **engine: Any) -> None:
    ENGINES[name] = Engine(name, functools.partial(build, *args), **engine)


_mesh = functools.cache(init_device_mesh)  # once in a process, as its groups stay


def _place() -> dict[str, int]:
    """This rank among data-parallel ranks that are all ranks."""
    return {"data_index": dist.get_rank(), "data_ranks": dist.get_world_size()}


# Plain PyTorch, DistributedDataParallel, replicate() and ZeroRedundancyOptimizer.


def _plain(seed: int) -> Training:
    model = net(seed)
    return Training(model, adam(model.parameters()))


class _Ddp(Training):
    def no_sync(self) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = self.model.no_sync()  # type: ignore[operator]
        return found


def _ddp(seed: int) -> Training:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net(seed), find_unused_parameters=True)
    return _Ddp(model, adam(model.parameters()), **_place())


def _zero_redundancy(seed: int) -> Training:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net(seed), find_unused_parameters=True)
    options = adam(net(seed).parameters()).defaults
    chosen = {key: options[key] for key in ("lr", "betas", "eps")}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, **chosen)
    return _Ddp(model, optimizer, **_place())


class _Replicate(Training):
    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)  # type: ignore[operator]


def _replicate(seed: int) -> Training:
    from torch.distributed._composable.replicate import replicate

    model = replicate(net(seed), find_unused_parameters=True)
    return _Replicate(model, adam(model.parameters()), **_place())


_add("plain", _plain, world_size=1, layout="1 rank")
_add("ddp", _ddp)
_add("replicate", _replicate)
_add("zero redundancy optimizer", _zero_redundancy)


# FlatPartition.


class _Flat(Training):
    _synchronizes = True

    def __init__(self, model: Net, partition: FlatPartition) -> None:
        super().__init__(model, adam([partition.hp_param]), **_place(), dtype=torch.bfloat16)
        self._partition = partition

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if self._synchronizes:
            self._partition.reduce_gradients()

    def step(self) -> None:
        super().step()
        self._partition.publish()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def close(self) -> None:
        self._partition.unlink()


def _flat(seed: int) -> Training:
    model = net(seed).bfloat16()
    return _Flat(model, FlatPartition(model.parameters()))


_add("flat partition", _flat, **BF16)


# FSDP2 and tensor parallelism.


class _Fsdp2(_Replicate):
    ignored: torch.nn.Parameter | None = None
    synchronizes = True

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if self.ignored is not None and self.synchronizes:  # whose it is to reduce
            dist.all_reduce(self.ignored.grad)
            self.ignored.grad.div_(self.data_ranks)  # type: ignore[union-attr]

    def step(self) -> None:
        super().step()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # what an eval forward left gathered does not follow the optimizer
                module.reshard()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.synchronizes = False
        with super().no_sync():
            yield
        self.synchronizes = True


def _fsdp2(axes: tuple[int, ...], nested: bool, ignores: bool, options: dict[str, Any], seed: int) -> Training:
    names = ("replicas", "shards")[-len(axes) :]
    model, mesh = net(seed), _mesh("cpu", axes, mesh_dim_names=names)
    ignored = {model.gain} if ignores else None
    for module in (model.up, model.down) if nested else ():
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, ignored_params=ignored, **options)
    training = _Fsdp2(model, adam(model.parameters()), **_place())
    training.ignored = model.gain if ignores else None
    return training


class _Tensor(Training):
    def no_sync(self) -> None:
        return None


def _tensor_parallel(around: int, seed: int) -> Training:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, mesh = net(seed), _mesh("cpu", (around, 2), mesh_dim_names=("fsdp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if around == 1:
        return _Tensor(model, adam(model.parameters()))
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["fsdp"])
    return _Fsdp2(model, adam(model.parameters()), data_index=dist.get_rank() // 2, data_ranks=around)


_FOUR = {"world_size": 4}
_BF16_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_add("fsdp2", _fsdp2, (2,), True, False, {}, layout="2 shards")
_add("fsdp2 one unit", _fsdp2, (2,), False, False, {}, layout="2 shards")
_add("fsdp2 bf16", _fsdp2, (2,), True, False, {"mp_policy": _BF16_POLICY}, layout="2 shards", **BF16)
_add("fsdp2 reshard", _fsdp2, (2,), True, False, {"reshard_after_forward": True}, layout="2 shards")
_add("fsdp2 no reshard", _fsdp2, (2,), True, False, {"reshard_after_forward": False}, layout="2 shards")
_add(
    "fsdp2 reshard to 2",
    _fsdp2,
    (4,),
    True,
    False,
    {"reshard_after_forward": 2},
    layout="4 shards",
    cells_per_start=19,
    **_FOUR,
)
_add("fsdp2 offload", _fsdp2, (2,), True, False, {"offload_policy": CPUOffloadPolicy(False)}, layout="2 shards")
_add("fsdp2 ignored", _fsdp2, (2,), True, True, {}, layout="2 shards")
_add("fsdp2 hybrid", _fsdp2, (2, 2), True, False, {}, layout="2 replicas x 2 shards", **_FOUR)
_add("tensor parallel", _tensor_parallel, 1, layout="2 tp")
_add("fsdp2 tensor parallel", _tensor_parallel, 2, layout="2 shards x 2 tp", **_FOUR)


# FSDP1.


def _fsdp1(strategy: str, original: bool, seed: int) -> Training:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    warnings.simplefilter("ignore", FutureWarning)
    hybrid = {"device_mesh": _mesh("cpu", (2, 2))} if "HYBRID" in strategy else {}
    model = FullyShardedDataParallel(
        net(seed),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}),
        device_id=torch.device("cpu"),
        **hybrid,
    )
    return (_Fsdp1 if original else _Fsdp1Flat)(model, adam(model.parameters()), **_place())


class _Fsdp1(_Ddp):
    def step(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils

        for module in FullyShardedDataParallel.fsdp_modules(self.model):
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                _runtime_utils._reshard(module, handle, True)  # what an eval forward left gathered is not optimized
        super().step()


class _Fsdp1Flat(_Fsdp1):
    """A flat parameter stands for all that are in it."""

    def named(self) -> dict[str, torch.Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        found: dict[str, torch.Tensor] = {}
        for module in FullyShardedDataParallel.fsdp_modules(self.model):
            handle = module._handle
            for fqn in handle.flat_param._fqns if handle is not None else ():
                prefix = next(name for name, other in self.model.named_modules() if other is module)
                parts = [part for part in f"{prefix}.{fqn}".split(".") if part not in ("", "_fsdp_wrapped_module")]
                found[".".join(parts)] = handle.flat_param
        return found


for _strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"):
    for _original in (True, False):
        _ranks = {"layout": "2 replicas x 2 shards", **_FOUR} if "HYBRID" in _strategy else {}
        _name = f"fsdp1 {_strategy.strip('_').lower()}{'' if _original else ' flat'}"
        _add(_name, _fsdp1, _strategy, _original, **_ranks)


# DeepSpeed.


class _DeepSpeed(Training):
    """Clears gradients in its step."""

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)  # type: ignore[operator]

    def step(self) -> None:
        self.model.step()  # type: ignore[operator]

    def zero_grad(self) -> None:
        return

    def no_sync(self) -> AbstractContextManager[None] | None:
        if self.model.zero_optimization_partition_gradients():  # type: ignore[operator]
            return None
        found: AbstractContextManager[None] = self.model.no_sync()  # type: ignore[operator]
        return found

    def close(self) -> None:
        self.model.destroy()  # type: ignore[operator]


def _prepare() -> None:
    import gc

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    warnings.simplefilter("ignore")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True  # the CPU accelerator refuses it, though it works
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.") and hasattr(module, "see_memory_usage"):
            module.see_memory_usage = lambda *_args, **_options: None  # collects garbage at each start
    gc.freeze()  # DeepSpeed collects garbage at each start: leave out what was imported


def _deepspeed(stage: str, dtype: str, options: dict[str, Any], seed: int) -> Training:
    import deepspeed

    sys.path.insert(0, str(Path(__file__).parents[1] / "deepspeed"))
    from engines import Case, configuration

    case, model = Case(stage, dtype, **options), net(seed)
    engine = deepspeed.initialize(
        model=model, optimizer=adam(model.parameters()), config=configuration(case), dist_init_required=False
    )[0]
    plain = engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else None
    return _DeepSpeed(engine, plain, **_place(), dtype=case.lp)


for _stage, _dtype, _options in (
    ("none", "fp32", {}),
    ("none", "bf16", {}),
    ("zero1", "fp32", {}),
    ("zero1", "bf16", {}),
    ("zero1", "fp16", {"config": {"fp16": {"enabled": True, "loss_scale": 16}}}),  # DeepSpeed unscales by the next one
    ("zero2", "fp32", {}),
    ("zero2", "bf16", {}),
    ("zero3", "fp32", {}),
    ("zero3", "bf16", {}),
    ("zero2", "bf16", {"offload": True}),
    ("zero3", "bf16", {"offload": True}),
    ("bf16opt", "bf16", {}),
):
    _kind = {"bf16": BF16, "fp16": {"compute": torch.float16, "tolerance": 0.01}, "fp32": {}}[_dtype]
    if (_stage, _dtype) == ("none", "bf16"):
        _kind = {**_kind, "idle_steps": 1}  # FP16_UnfusedOptimizer makes its state with a step
    _words = ["deepspeed", _stage.replace("none", "zero0"), _dtype, "offload" * ("offload" in _options)]
    _environment = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
    _add(
        " ".join(filter(None, _words)),
        _deepspeed,
        _stage,
        _dtype,
        _options,
        env=_environment,
        prepare=_prepare,
        **_kind,
    )


# The example of an engine with masters and gradients beside its parameters, and an adapter of its own.


class _MainParam(Training):
    """Float16Optimizer, in few words: bf16 parameters, fp32 masters, gradients summed in fp32 and reduced."""

    _synchronizes = True

    def __init__(self, model: Net) -> None:
        self._params: list[Any] = list(model.parameters())
        masters = [torch.nn.Parameter(param.detach().clone()) for param in self._params]
        model.bfloat16()
        self._params = list(model.parameters())
        optimizer = adam(masters)
        for param, master in zip(self._params, masters, strict=True):
            param.main_param, param.main_optimizer = master, optimizer
            param.main_grad, param.main_grad_reduced = torch.zeros_like(master), False
        super().__init__(model, optimizer, **_place(), dtype=torch.bfloat16)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        for param in self._params:
            if param.grad is not None:
                param.main_grad += param.grad
                param.grad = None
            if self._synchronizes:
                dist.all_reduce(param.main_grad)
                param.main_grad /= self.data_ranks
                param.main_grad_reduced = True

    def step(self) -> None:
        for param in self._params:
            param.main_param.grad = param.main_grad
        super().step()
        for param in self._params:
            param.data.copy_(param.main_param.detach())
            param.main_grad_reduced = False

    def zero_grad(self) -> None:
        for param in self._params:
            param.main_param.grad, param.main_grad_reduced = None, False
            param.main_grad.zero_()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True


def _main_param(seed: int) -> Training:
    return _MainParam(net(seed))


def _register() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
    from main_param_adapter import register

    register()


_add("main_param", _main_param, prepare=_register, **BF16)

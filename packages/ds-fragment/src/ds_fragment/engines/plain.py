"""Parameters that every rank holds whole: plain PyTorch and DistributedDataParallel."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_fragment.engines.base import Adapter, missing_gradient, state_entry, state_of, value_kind
from ds_fragment.engines.gradient import require_current
from ds_fragment.engines.loaded import is_a
from ds_fragment.engines.optimized import Optimized, optimized_by
from ds_fragment.layout import whole
from ds_fragment.record import note, noted, record_of, registry
from ds_fragment.sharding import Sharding


class PlainAdapter(Adapter):
    """Claims every tensor that no other adapter does: each rank holds the whole."""

    name = "plain"

    def learn(self, model: nn.Module) -> None:
        """Note the group over which DistributedDataParallel or a DeepSpeedEngine reduces each gradient."""
        for module in model.modules():
            group = _data_parallel_group(module)
            if group is not None:
                experts: Any = getattr(module, "expert_data_parallel_group", None) or {}  # of a DeepSpeedEngine
                for param in module.parameters():
                    note(param, _Replicas(experts.get(getattr(param, "group_name", None), group)))

    def claims(self, param: torch.Tensor) -> bool:
        """Every tensor."""
        return True

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """Whole on this rank."""
        found = self._part(param, self._owned(param), what) if what == "value" else self.local(param, what)
        like = (found.shape, found.dtype, found.device)
        return record_of(param).sharding(like, None, lambda: Sharding(*like, whole(found.shape), None))

    def writers(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The data-parallel ranks of the model that was attached."""
        replicas = noted(param, _Replicas)
        return () if replicas is None else (replicas.group,)

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The tensor itself."""
        if what == "lp":
            return param.detach()
        if what == "value":
            owned = self._owned(param)
            if owned is param and param.requires_grad and value_kind(param.dtype) == "upcast":
                _warn_of_masters(param)
            return self._part(param, owned.detach(), what)
        if what == "grad":
            master = registry.master_of(param)
            owner = param if master is None or master.grad is None else master
            if owner.grad is None:
                raise missing_gradient(param)
            require_current(owner, param)
            return owner.grad.detach()
        owned = self._owned(param)
        entry = state_entry(state_of(owned, param), param, what, quantised=owned is param)
        return self._part(param, entry, what)

    def _owned(self, param: torch.Tensor) -> torch.Tensor:
        """The tensor that the optimizer updates: the attached master, or the parameter itself."""
        master = registry.master_of(param)
        return param if master is None else master

    def _part(self, param: torch.Tensor, found: torch.Tensor, what: str) -> torch.Tensor:
        """The parameter's own part of the tensor that the optimizer updates, or of a state of it."""
        return found

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state."""
        return list(state_of(self._owned(param), param))

    def optimized(self, params: Sequence[torch.Tensor]) -> list[Optimized | None]:
        """By the optimizer of the master, or of the parameter itself."""
        owned = list(map(self._owned, params))
        return optimized_by(list(map(registry.optimizer_of, owned)), owned)

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a low-precision parameter without a master."""
        return value_kind(self._owned(param).dtype)

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Copy masters to their parameters."""
        for param in params:
            owned = self._owned(param)
            if owned is not param:
                param.data.copy_(self._part(param, owned.data, "value"))


@dataclass(frozen=True)
class _Replicas:
    """The ranks that hold a parameter whole and reduce its gradient."""

    group: dist.ProcessGroup


def _data_parallel_group(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a module reduces its gradients, if it wraps another to do so."""
    if isinstance(module, DistributedDataParallel):
        return module.process_group
    if is_a(module, "deepspeed", "DeepSpeedEngine"):
        group: Any = getattr(module, "seq_data_parallel_group", None) or getattr(module, "data_parallel_group", None)
        return dist.group.WORLD if group is None else group
    contract: Any = sys.modules.get("torch.distributed._composable.contract")
    states = {} if contract is None else vars(module).get(contract.STATE_KEY, {})  # of the composable APIs
    for state in states.values():
        if is_a(state, "torch.distributed._composable.replicate", "_ReplicateState"):
            return _replicate_group(state)
    return None


def _replicate_group(state: Any) -> dist.ProcessGroup | None:
    """The ranks of a `replicate()`, which makes its DistributedDataParallel at the first forward."""
    wrapper = getattr(state, "_ddp", None)
    if wrapper is not None:
        made: dist.ProcessGroup = wrapper.process_group
        return made
    mesh, given = (state._init_kwargs.get(name) for name in ("device_mesh", "process_group"))
    return given or (dist.group.WORLD if mesh is None else mesh.get_group())


def _warn_of_masters(param: torch.Tensor) -> None:
    """Warn that a value is upcast, where an engine that was not attached may keep an fp32 master."""
    if "deepspeed.runtime.engine" in sys.modules and not registry.is_named(param):
        warnings.warn(
            f"the value of {registry.name_of(param)} is its {param.dtype} weight, upcast: if a DeepSpeed engine "
            "without ZeRO trains it, call attach(engine) to have its fp32 master",
            stacklevel=2,
        )

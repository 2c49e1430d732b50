"""What a rehearsal is asked for, and whether the model can be rehearsed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ds_z3leaf._rehearse.passes import Forward
from ds_z3leaf.errors import LeafRehearsalError, LeafTypeError, LeafValueError


@dataclass(frozen=True)
class Options:
    """How to rehearse; `rehearse` says what each means."""

    forward: Forward | None
    max_batches: int
    backward: bool
    repeats: int | None
    across_batches: bool
    group: Any
    device: str | None

    def check(self, batches: object) -> None:
        """Raise `LeafTypeError` or `LeafValueError` for what cannot be used."""
        if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping, nn.Module, torch.Tensor)):
            raise LeafTypeError(f"batches is a {type(batches).__name__}: pass a list of batches, or a loader")
        if self.forward is not None and not callable(self.forward):
            raise LeafTypeError(f"forward is a {type(self.forward).__name__}: pass a function of a model and a batch")
        for name, value in (("max_batches", self.max_batches), ("repeats", self.repeats)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise LeafValueError(f"{name}={value!r}: pass a whole number from 1")
        if self.device not in (None, "meta", "model"):
            raise LeafValueError(f"device={self.device!r}: pass 'meta', 'model' or None")


def needs_meta(model: nn.Module) -> bool:
    """Whether the model can run on meta only.

    Raises:
        LeafRehearsalError: an engine has the model, so that a forward communicates; or its parameters cannot have
            stand-ins.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, (FSDPModule, FullyShardedDataParallel, DistributedDataParallel)):
            raise LeafRehearsalError(
                f"{name or 'the model'} ({type(module).__name__}) communicates in its forward: rehearse before "
                "the model is wrapped or sharded"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise LeafRehearsalError(
                f"{name or 'the model'} is a ScriptModule, whose calls cannot be recorded: rehearse the model before "
                "torch.jit compiles it"
            )
        if any(isinstance(param, UninitializedParameter) for param in module._parameters.values()):
            raise LeafRehearsalError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters without a shape: run one forward "
                "first, which gives them one"
            )
    partitioned = [name for name, param in model.named_parameters() if hasattr(param, "ds_id")]
    if partitioned and any(hasattr(module, "ds_id") for module in model.modules()):
        raise LeafRehearsalError("the model is in a DeepSpeed engine: rehearse before deepspeed.initialize()")
    return bool(partitioned) or any(param.is_meta for param in model.parameters())

"""DeepSpeed without ZeRO, in bf16 or fp16: every rank keeps the fp32 masters of all parameters.

Its FP16_UnfusedOptimizer keeps a master of each parameter, and its base optimizer the state of those. What its
FP16_Optimizer keeps beside fused optimizers is flat, and refused: the engine would undo a write of the parameter.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ds_fragment._adapters._deepspeed import UNREDUCED, loss_scale, no_gradient
from ds_fragment._adapters._plain import PlainAdapter
from ds_fragment._identity import IdentityMap
from ds_fragment._loaded import is_a
from ds_fragment._registry import registry
from ds_fragment.errors import UnlinkedParameterError

# DeepSpeed 0.19.6 divides fp16 gradients by a loss scale that it did not multiply them by; older ones do both.
_UNTOLD = "with {} and without ZeRO, DeepSpeed does not tell whether the gradient {}: use ZeRO stage 1, which does"


class DeepSpeedUnshardedAdapter(PlainAdapter):
    """Claims what the low-precision optimizer of an attached engine trains."""

    name = "deepspeed"

    def __init__(self) -> None:
        super().__init__()
        self._engines = IdentityMap[weakref.ref[Any]]()

    def learn(self, model: nn.Module) -> None:
        """The optimizer of a DeepSpeedEngine."""
        optimizer: Any = getattr(model, "optimizer", None)
        unfused = is_a(optimizer, "deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
        if not unfused and not is_a(optimizer, "deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer"):
            return
        reference = weakref.ref(model)
        for index, params in enumerate(optimizer.fp16_groups):
            for position, param in enumerate(params):
                self._engines[param] = reference
                if unfused:
                    registry.add_master(param, optimizer.fp32_groups[index][position])
        if unfused:
            registry.add_optimizer(optimizer.optimizer)

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the engine is there, and trains the parameter."""
        return self._engine(param) is not None

    def _engine(self, param: torch.Tensor) -> Any:
        reference = self._engines.get(param)
        return None if reference is None else reference()

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The master or its state; the gradient in fp32, where it is known to be reduced."""
        _require_master(param)
        return self._gradient(param).float() if what == "grad" else super().local(param, what)

    def _gradient(self, param: torch.Tensor) -> torch.Tensor:
        """As the engine keeps it, in the parameter's own dtype."""
        engine = self._engine(param)
        if not engine.enable_backward_allreduce or engine.inside_no_sync_ctxt:
            raise no_gradient(param, UNREDUCED)
        if engine.gradient_accumulation_steps() > 1:
            raise no_gradient(param, _UNTOLD.format("gradient_accumulation_steps > 1", "is reduced yet"))
        scale = loss_scale(engine.optimizer)
        if scale != 1.0:
            raise no_gradient(param, _UNTOLD.format(f"a loss scale of {scale:g}", "was multiplied by it"))
        return super().local(param, "grad")

    def write(self, param: torch.Tensor, what: str, piece: torch.Tensor) -> None:
        """Replace it, a gradient in the parameter's own dtype."""
        if what == "grad":
            stored = self._gradient(param)
            stored.copy_(piece.view(stored.shape))
        else:
            super().write(param, what, piece)

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the base optimizer's state."""
        _require_master(param)
        return super().state_keys(param)


def _require_master(param: torch.Tensor) -> None:
    if registry.master_of(param) is None:
        raise UnlinkedParameterError(
            f"{registry.name_of(param)} is kept by DeepSpeed's FP16_Optimizer in flat fp32 tensors, which cannot be "
            "read or written: use ZeRO stage 1, which can"
        )

"""DeepSpeed without ZeRO, in bf16 or fp16: every rank keeps the fp32 masters of all parameters.

Its FP16_UnfusedOptimizer keeps a master of each parameter. Its FP16_Optimizer, which it takes beside FusedAdam, keeps
one flat master for each parameter group, of all its parameters one after the other. The base optimizer's state belongs
to the masters, and is cut like them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_fragment.engines.deepspeed import UNREDUCED, loss_scale, no_gradient
from ds_fragment.engines.loaded import is_a
from ds_fragment.engines.plain import PlainAdapter
from ds_fragment.engines.state import other_shape
from ds_fragment.record import note, noted, registry

# DeepSpeed 0.19.6 divides fp16 gradients by a loss scale that it did not multiply them by; older ones do both.
_UNTOLD = "with {} and without ZeRO, DeepSpeed does not tell whether the gradient {}: use ZeRO stage 1, which does"


class _Slot(NamedTuple):
    """Where the optimizer of an engine keeps a parameter: in which group, and there as which one or from where on."""

    engine: weakref.ref[Any]
    group: int
    position: int
    start: int


class DeepSpeedUnshardedAdapter(PlainAdapter):
    """Claims the parameters that the low-precision optimizer of an attached engine trains."""

    name = "deepspeed"
    marks = (_Slot,)

    def learn(self, model: nn.Module) -> None:
        """Note where the optimizer of a DeepSpeedEngine keeps each parameter."""
        optimizer: Any = getattr(model, "optimizer", None)
        if not _is_fused(optimizer) and not is_a(
            optimizer, "deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer"
        ):
            return
        reference = weakref.ref(model)
        for group, params in enumerate(optimizer.fp16_groups):
            start = 0
            for position, param in enumerate(params):
                note(param, _Slot(reference, group, position, start))
                start += param.numel()
        registry.add_optimizer(optimizer.optimizer)

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the engine is alive, and trains the parameter."""
        slot = noted(param, _Slot)
        return slot is not None and slot.engine() is not None

    def _kept(self, param: torch.Tensor) -> tuple[Any, _Slot]:
        """The engine, and where its optimizer keeps the parameter."""
        slot = noted(param, _Slot)
        assert slot is not None
        return slot.engine(), slot

    def _owned(self, param: torch.Tensor) -> torch.Tensor:
        """The parameter's master, or the flat one that it is a part of."""
        engine, slot = self._kept(param)
        found: torch.Tensor = (
            engine.optimizer.fp32_groups_flat[slot.group]
            if _is_fused(engine.optimizer)
            else engine.optimizer.fp32_groups[slot.group][slot.position]
        )
        return found

    def _part(self, param: torch.Tensor, found: torch.Tensor, what: str) -> torch.Tensor:
        engine, slot = self._kept(param)
        flat = self._owned(param).shape
        if _is_fused(engine.optimizer) and found.shape == flat:
            return found[slot.start : slot.start + param.numel()].view(param.shape)
        if _is_fused(engine.optimizer) and found.numel() != 1:
            raise other_shape(found, param, what, flat)
        return found

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The master or its state; the gradient in fp32, where it is known to be reduced."""
        return self._gradient(param).float() if what == "grad" else super().local(param, what)

    def _gradient(self, param: torch.Tensor) -> torch.Tensor:
        """As the engine keeps it, in the parameter's own dtype."""
        engine, _ = self._kept(param)
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

    def writes_through(self, what: str) -> bool:
        """All but gradients, which are read in fp32."""
        return what != "grad"


def _is_fused(optimizer: Any) -> bool:
    return is_a(optimizer, "deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer")

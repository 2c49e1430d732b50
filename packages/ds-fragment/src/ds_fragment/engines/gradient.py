"""Checks that the gradient in ``param.grad`` has not been stepped with, and is not multiplied by a loss scale.

[Note: stepped] A gradient stays in ``param.grad`` after the optimizer has stepped with it. A hook on all of torch's
optimizers leaves a mark on it then: the version that torch counts of the gradient's memory. A gradient of another
version, or in another tensor, is a new one.

[Note: scaled] A `torch.amp.GradScaler` multiplies the loss and so the gradients, until ``unscale_(optimizer)``.
Nothing on a gradient shows that. So ``GradScaler.scale`` is wrapped: the backward pass of a loss that it returns marks
the gradients of attached models that it changes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, TypeVar

import torch
from torch.amp import GradScaler
from torch.optim.optimizer import register_optimizer_step_post_hook

from ds_fragment.engines.loaded import is_dtensor
from ds_fragment.errors import GradientUnavailableError
from ds_fragment.record import registry

# Attributes of the memory of gradients: by the id of the parameter, the version that was stepped with, and the id of
# the scaler. They are numbers, so that a gradient that is saved or copied takes nothing else along.
_STEPPED, _SCALED = "_ds_fragment_stepped", "_ds_fragment_scaled"

F = TypeVar("F", bound=Callable[..., Any])

_scalers: MutableMapping[int, GradScaler] = weakref.WeakValueDictionary()  # by id; those that have scaled a loss
_wrapped: set[type] = set()


def _memory(grad: torch.Tensor) -> torch.Tensor:
    """The tensor that has the gradient's memory: of a view what it is a view of, of a DTensor the local one."""
    local = grad._local_tensor if is_dtensor(grad) else grad
    base = local._base
    return local if base is None else base


def _version(memory: torch.Tensor) -> int:
    return -1 if memory.is_inference() else memory._version  # that of inference mode has no versions


def _not_compiled(function: F) -> F:
    """The function, which is not compiled with what calls it; `torch.compiler.disable` imports the compiler at once."""
    disable: Any = torch._disable_dynamo  # type: ignore[attr-defined]
    disabled: F = disable(function)
    return disabled


@_not_compiled
def _note_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Mark the gradients that were stepped with; see [Note: stepped]."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            _mark_stepped(param)
            lowered = registry.lowered(param)
            if lowered is not None:
                _mark_stepped(lowered)


def _mark_stepped(param: torch.Tensor) -> None:
    if param.grad is not None:
        memory = _memory(param.grad)
        memory.__dict__.setdefault(_STEPPED, {})[id(param)] = _version(memory)


def watch_scalers() -> None:
    """Wrap the ``scale`` of every class of scalers that there is by now; see [Note: scaled]."""
    kinds = [GradScaler]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind not in _wrapped and "scale" in vars(kind):
            _wrapped.add(kind)
            kind.scale = _noting(kind.scale)  # type: ignore[method-assign]


def _noting(scale: Callable[..., Any]) -> Callable[..., Any]:
    @_not_compiled
    @functools.wraps(scale)
    def noting(self: GradScaler, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        if self.is_enabled():
            _scalers[id(self)] = self
            for tensor in _tensors(scaled):
                tensor.register_hook(functools.partial(_watch_backward, id(self)))  # type: ignore[no-untyped-call]
        return scaled

    return noting


def _tensors(scaled: Any) -> Iterator[torch.Tensor]:
    """The tensors that a backward pass may begin with."""
    if isinstance(scaled, torch.Tensor):
        if scaled.requires_grad:
            yield scaled
    elif isinstance(scaled, Iterable):
        for each in scaled:
            yield from _tensors(each)


def _watch_backward(scaler: int, _: torch.Tensor) -> None:
    """At the start of a scaled loss's backward pass, queue a callback that marks the gradients it has changed."""
    before = {id(param): _state(param) for param in _attached()}

    def mark() -> None:
        for param in _attached():
            if param.grad is not None and _state(param) != before.get(id(param)):
                _memory(param.grad).__dict__.setdefault(_SCALED, {})[id(param)] = scaler

    # Engines queue their own callbacks during the pass. The inner one is queued behind those, so that it runs last.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(mark))


def _attached() -> Iterator[torch.Tensor]:
    return (param for model in registry.models() for param in model.parameters())


def _state(param: torch.Tensor) -> tuple[int, int] | None:
    """Different after a backward pass that changed the gradient."""
    if param.grad is None:
        return None
    memory = _memory(param.grad)
    return id(memory), _version(memory)


def require_current(owner: torch.Tensor, param: torch.Tensor) -> None:
    """Raise if the gradient in ``owner.grad`` is not the one that the next step will use.

    Args:
        owner: the tensor that has the gradient: the parameter, or its fp32 master.
        param: the parameter of the model, for messages.

    Raises:
        GradientUnavailableError: an optimizer has stepped with it, or it is multiplied by a loss scale.
    """
    assert owner.grad is not None
    memory = _memory(owner.grad)
    stepped = getattr(memory, _STEPPED, None)
    if stepped is not None and stepped.get(id(owner)) == _version(memory):
        raise GradientUnavailableError(
            f"{registry.name_of(param)} has no gradient any more: the optimizer has stepped with it; read it between "
            "the backward pass and step()"
        )
    if _scalers and _is_scaled(owner, param, memory):
        raise GradientUnavailableError(
            f"{registry.name_of(param)} has a gradient that is multiplied by the scale of a GradScaler: call "
            "attach(model, optimizer) before the backward pass, and scaler.unscale_(optimizer) after it"
        )


def _is_scaled(owner: torch.Tensor, param: torch.Tensor, memory: torch.Tensor) -> bool:
    """Whether the gradient is of a scaled loss and was not unscaled since; assumed of models not attached."""
    scaler = getattr(memory, _SCALED, {}).get(id(owner))
    if scaler is None:
        return not registry.is_named(param)
    optimizer = registry.optimizer_of(owner)
    states = getattr(_scalers.get(scaler), "_per_optimizer_states", {})
    state = states.get(id(optimizer))
    return state is None or state["stage"].name == "READY"


watch_scalers()
register_optimizer_step_post_hook(_note_step)

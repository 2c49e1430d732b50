"""Optimizer state of every kind: which can be read and how, and whether the ranks hold the same.

[Note: kinds] An optimizer may keep anything beside a parameter. A number, a dense tensor and a DTensor are read as they
are. A quantised tensor is read through its own ``dequantize``. Everything else raises an error that names its class.
A plain tensor beside a sharded DTensor parameter is the whole if it has the whole shape, or is one number. Of any
other shape it is refused: one that is as large as the local tensor may be this rank's piece, or a matrix of low rank
that all ranks have in common.

[Note: same] State that every rank holds whole may still differ over the ranks, as a statistic of the local gradient
does. So the ranks compare it before they read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ds_fragment.engines.loaded import is_a, is_dtensor
from ds_fragment.errors import StateKeyError
from ds_fragment.record import registry

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DENSE = {torch.Tensor, torch.nn.Parameter}
_KEPT_AS = "_ds_fragment_kept_as"  # the attribute of a tensor that was computed from what the optimizer keeps


def about(param: torch.Tensor, key: str) -> str:
    """The name of the state in messages."""
    return f"optim_state_key '{key}' of {registry.name_of(param)}"


def readable(entry: object, param: torch.Tensor, key: str, *, quantised: bool = False) -> torch.Tensor:
    """An entry of an optimizer's state as a tensor: see [Note: kinds]. Python numbers become 0-dimensional tensors.

    Args:
        entry: a tensor, a number, or anything else.
        param: the parameter, for messages.
        key: the state's.
        quantised: whether a quantised tensor may be read.

    Raises:
        StateKeyError: it is neither a number nor a tensor that can be read.
    """
    if isinstance(entry, torch.Tensor):
        return entry if is_dtensor(entry) else dense(entry, param, key, quantised=quantised)
    if not isinstance(entry, int | float):
        raise StateKeyError(
            f"{about(param, key)} is a {type(entry).__name__}, neither a tensor nor a number: read it in "
            "optimizer.state"
        )
    try:
        return torch.tensor(entry)
    except (RuntimeError, ValueError) as error:
        raise StateKeyError(f"{about(param, key)} is an integer of more than 64 bits") from error


def are_dense(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are of torch's own classes, which `dense` returns as they are; fast for many."""
    return set(map(type, tensors)) <= _DENSE


def dense(tensor: torch.Tensor, param: torch.Tensor, key: str, *, quantised: bool = True) -> torch.Tensor:
    """A tensor of any class as one of torch's own.

    Raises:
        StateKeyError: it is sparse, or of a class that cannot be read as a dense tensor.
    """
    kind: Any = type(tensor)
    if tensor.layout != torch.strided:
        raise StateKeyError(f"{about(param, key)} is a tensor of layout {tensor.layout}: read it in optimizer.state")
    if kind in _DENSE:
        return tensor
    if is_a(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        waited: torch.Tensor = tensor.wait()  # type: ignore[attr-defined]
        return waited
    if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:  # it holds its data as any tensor does
        return tensor.as_subclass(torch.Tensor)
    if not quantised or kind.dequantize is torch.Tensor.dequantize:
        raise StateKeyError(
            f"{about(param, key)} is a {kind.__name__}, a tensor class of its own that cannot be read as a dense "
            "tensor here: read it in optimizer.state"
        )
    found: torch.Tensor = tensor.detach().dequantize().to(tensor.dtype)
    if type(found) is not torch.Tensor or found.shape != tensor.shape:
        raise StateKeyError(
            f"{about(param, key)} is a {kind.__name__} of shape {tuple(tensor.shape)}, which dequantizes to a "
            f"{type(found).__name__} of shape {tuple(found.shape)}: read it in optimizer.state"
        )
    setattr(found, _KEPT_AS, kind.__name__)
    return found


def kept_as(piece: torch.Tensor) -> str:
    """The class that the optimizer keeps a dequantised piece in; empty for a piece that is the optimizer's own."""
    found: str = getattr(piece, _KEPT_AS, "")
    return found


def require_whole(entry: torch.Tensor, param: DTensor, key: str) -> None:
    """Raise unless a plain tensor beside a sharded parameter can only be the whole: see [Note: kinds].

    Raises:
        StateKeyError: it has another shape, and more than one element.
    """
    if entry.shape != param.shape and entry.numel() != 1:
        local = tuple(param._local_tensor.shape)
        raise StateKeyError(
            f"{about(param, key)} is a plain tensor of shape {tuple(entry.shape)} beside a DTensor of shape "
            f"{tuple(param.shape)}, of which this rank holds {local}: nothing says what it is a part of. Read each "
            "rank's own with safe_get_local_optimizer_state, or keep a DTensor in optimizer.state"
        )


def other_shape(entry: torch.Tensor, param: torch.Tensor, key: str, shape: torch.Size) -> StateKeyError:
    """The error for state of a flat tensor that is neither one number an element nor one number."""
    return StateKeyError(
        f"{about(param, key)} has shape {tuple(entry.shape)} for the flat {tuple(shape)} that the parameter is part "
        "of: it is no number of each element, nor one of all"
    )


def different_state(what: str, names: str) -> StateKeyError:
    """The error for state that every rank holds whole, with values that differ."""
    return StateKeyError(
        f"'{what}' of {names} differs over the ranks: it is each rank's own, such as a local statistic, and no rank "
        "has the whole; read it in optimizer.state on each rank"
    )

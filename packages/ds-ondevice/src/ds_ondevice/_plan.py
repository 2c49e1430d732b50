"""Decide what shall become of every tensor of a module, then build its replacement."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_ondevice._recording import address_of, is_plain, mark_of, view_of
from ds_ondevice._replay import History, as_tensor, fill, replay
from ds_ondevice._slots import Slot

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Fate(Enum):
    """What becomes of one tensor."""

    KEPT = "is where it belongs already"
    MOVED = "is real, on another device: copied"
    RESTORED = "computed as construction would have"
    UNINITIALIZED = "construction, or the caller, gave it no value"
    MISSING = "its value is not known"
    UNSUPPORTED = "cannot even be allocated"


@dataclass(frozen=True)
class Decision:
    """One tensor, what becomes of it, and why if it has no value."""

    tensor: torch.Tensor
    fate: Fate
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Decisions, by the id of the tensor; the history that restores; whether parameters get values."""

    decisions: dict[int, Decision]
    history: History
    init: bool

    def reasons(self, slots: Iterable[Slot], fate: Fate) -> dict[str, str]:
        """Why, by name, for each slot that holds a tensor of this fate."""
        found = ((slot.name, self.decisions[id(tensor)]) for slot in slots for tensor in slot.tensors())
        return {name: decision.reason for name, decision in found if decision.fate is fate}


def make_plan(slots: list[Slot], device: torch.device, *, init: bool) -> Plan:
    """Decide about every tensor that ``slots`` hold; changes nothing.

    Args:
        slots: all the slots of a module.
        device: where the module shall go, with its index.
        init: whether parameters shall be given values.
    """
    tensors = {id(tensor): tensor for slot in slots for tensor in slot.tensors()}
    parameters = {id(tensor) for slot in slots if slot.kind == "parameter" for tensor in slot.tensors()}
    marks = [mark_of(local_of(t)) for t in tensors.values() if t.is_meta and not _unsupported(t, device)]
    history = History.of(recording for mark in marks if mark is not None for recording in mark.recordings)
    decisions = {}
    for key, tensor in tensors.items():
        blank = not init and key in parameters
        decisions[key] = _decide(tensor, device, history, blank=blank)
    return Plan(decisions, history, init)


def _decide(tensor: torch.Tensor, device: torch.device, history: History, *, blank: bool) -> Decision:
    reason = _unsupported(tensor, device)
    if not tensor.is_meta:
        settled = tensor.device == device or bool(reason) or is_dtensor(tensor)
        return Decision(tensor, Fate.KEPT if settled else Fate.MOVED)
    if reason:
        return Decision(tensor, Fate.UNSUPPORTED, reason)
    if blank:
        return Decision(tensor, Fate.UNINITIALIZED)
    local = local_of(tensor)
    mark = mark_of(local)
    if mark is None:
        return Decision(tensor, Fate.MISSING, _UNRECORDED_SHARD if is_dtensor(tensor) else _UNRECORDED)
    if mark.key in history.broken:
        return Decision(tensor, Fate.MISSING, history.broken[mark.key])
    if not local.is_inference() and not mark.explains(local._version):
        return Decision(tensor, Fate.MISSING, "it was changed in place outside `with OnDevice(...)`; do that inside")
    return Decision(tensor, Fate.RESTORED)


_UNRECORDED = "it was not made inside `with OnDevice(...)`"
_UNRECORDED_SHARD = (
    "it was sharded outside `with OnDevice(...)`; shard inside the block that builds the module, or materialize first"
)


def _unsupported(tensor: torch.Tensor, device: torch.device) -> str:
    """Why a tensor is beyond us; "" if it is not."""
    if torch.nn.parameter.is_lazy(tensor):
        return "it is a lazy parameter without a shape; run one forward pass first"
    if is_dtensor(tensor):
        kind = tensor.device_mesh.device_type
        if kind != device.type:
            return f"its device mesh is of {kind} devices, not {device.type}"
        return _unsupported(local_of(tensor), device)
    if is_traceable_wrapper_subclass(tensor):
        return f"{type(tensor).__name__} tensors are not supported"
    return "" if is_plain(tensor) else f"its layout is {tensor.layout}, or it is quantized or conjugated: not supported"


def build(plan: Plan, device: torch.device) -> tuple[dict[int, torch.Tensor], dict[int, Fate]]:
    """Make the real tensors; the module is not touched.

    Returns:
        The replacements, and the fate of every tensor as it turned out; both by the old tensor's id.
    """
    fates = {key: decision.fate for key, decision in plan.decisions.items()}
    chosen = {key: decision.tensor for key, decision in plan.decisions.items() if decision.fate is not Fate.KEPT}
    keys = {key: _key(tensor) for key, tensor in chosen.items() if fates[key] is Fate.RESTORED}
    replayed = replay(plan.history, keys.values(), device, draws=plan.init)
    storages = {address_of(local_of(chosen[key])): replayed.storages[keys[key]] for key in keys}
    restored = frozenset(storages)
    replacements = {}
    with torch.no_grad():
        for key, tensor in chosen.items():
            local = local_of(tensor)
            address = address_of(local)
            if address not in storages:
                storages[address] = _new_storage(local, device)
            view = as_tensor(view_of(local, 0), storages[address])
            if address not in restored and fates[key] is not Fate.MOVED:
                fill(view)
            replacements[key] = _like(tensor, view)
    fates.update({key: Fate.UNINITIALIZED for key in keys if keys[key] in replayed.unwritten})
    return replacements, fates


def _key(tensor: torch.Tensor) -> int:
    mark = mark_of(local_of(tensor))
    assert mark is not None  # _decide saw it
    return mark.key


def _new_storage(tensor: torch.Tensor, device: torch.device) -> torch.UntypedStorage:
    """As large as the tensor's on ``device``, and holding the same bytes if that has any."""
    old = tensor.untyped_storage()
    storage = torch.UntypedStorage(old.nbytes(), device=device)  # type: ignore[no-untyped-call]
    if not tensor.is_meta:
        storage.copy_(old)
    return storage


def _like(old: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """``view`` as the same kind of tensor as ``old``: class, sharding, attributes, ``requires_grad`` of a leaf."""
    requires_grad = old.requires_grad and old.is_leaf
    new: torch.Tensor
    if is_dtensor(old):
        new = type(old).from_local(
            view, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
        new = torch.nn.Parameter(new, requires_grad) if isinstance(old, torch.nn.Parameter) else new
    else:
        new = torch.Tensor._make_subclass(type(old), view, requires_grad)
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)
    return new


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing that module: a DTensor exists only if somebody did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this rank holds: the shard of a DTensor, any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor

"""Decide what shall become of every tensor of a module, then build its replacement."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, TypeGuard

import torch

from ds_ondevice._modules import GuardedParameter, GuardedTensor, plain_type
from ds_ondevice._ops import View, address_of, is_plain, is_recorded, mark_of, view_of
from ds_ondevice._replay import History, as_tensor, fill, replay
from ds_ondevice._slots import Slot, own_slots

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
    """What shall become of every tensor of a module.

    Attributes:
        decisions: by the id of the tensor.
        history: what restores.
        locals: the local parts of sharded tensors that are recorded elsewhere, by the id of the sharded one.
        draws: whether every recorded random number is drawn.
        dtype: what floating-point tensors shall be; None leaves them.
    """

    decisions: dict[int, Decision]
    history: History
    locals: dict[int, torch.Tensor]
    draws: bool
    dtype: torch.dtype | None

    def reasons(self, slots: Iterable[Slot], fate: Fate) -> dict[str, str]:
        """Why, by name, for each slot that holds a tensor of this fate."""
        found = ((slot.name, self.decisions[id(tensor)]) for slot in slots for tensor in slot.held)
        return {name: decision.reason for name, decision in found if decision.fate is fate}

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The recorded tensor that holds this rank's part of a tensor."""
        found = self.locals.get(id(tensor)) if self.locals else None
        return local_of(tensor) if found is None else found

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype that a tensor shall have."""
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype


def make_plan(
    parts: Iterable[torch.nn.Module],
    slots: list[Slot],
    device: torch.device,
    *,
    blank: Callable[[Slot], bool],
    draws: bool,
    dtype: torch.dtype | None,
) -> Plan:
    """Decide about every tensor that ``slots`` hold, and about those that no module holds; changes nothing.

    Args:
        parts: a module and all that belong to it.
        slots: all of their slots.
        device: where the module shall go, with its index.
        blank: whether what a slot holds shall have memory, but no value.
        draws: whether every recorded random number is drawn.
        dtype: what floating-point tensors shall be.
    """
    tensors = {id(tensor): tensor for slot in slots for tensor in slot.held}
    blanks = {id(tensor) for slot in slots if blank(slot) for tensor in slot.held}
    locals_: dict[int, torch.Tensor] = {}
    if any(map(is_dtensor, tensors.values())):
        from ds_ondevice._reshard import resharded  # imports torch.distributed

        locals_ = {id(tensor): local for tensor, local in resharded(parts, slots)}
    plan = Plan({}, History((), (), {}), locals_, draws, dtype)
    marks = [mark_of(plan.local(t)) for t in tensors.values() if t.is_meta and not _unsupported(t, device)]
    plan = replace(plan, history=History.of(found for mark in marks if mark is not None for found in mark.recordings))
    for key, tensor in tensors.items():
        plan.decisions[key] = _decide(plan, tensor, device, blank=key in blanks)
    return plan


def find_strays(plan: Plan, parts: Iterable[torch.nn.Module], slots: list[Slot]) -> list[torch.Tensor]:
    """Recorded tensors that no module holds, but somebody does: in a cache, an object of its own, a variable.

    Those that share memory with sharded tensors are left to the engine that sharded them, those with an autograd graph
    to whoever made it. A plan of these tensors is added to ``plan``.
    """
    here, seen = set(parts), set[int]()
    modules = (module() for recording in plan.history.recordings for module in recording.modules)
    others = (module for module in modules if module is not None and module not in here)
    elsewhere = (slot for module in others for slot in own_slots(module, "", seen))
    held = {id(tensor) for slot in (*elsewhere, *slots) for tensor in slot.held}
    engine = {_key(plan, tensor) for slot in slots for tensor in slot.held if is_dtensor(tensor) and tensor.is_meta}
    found: dict[int, torch.Tensor] = {}
    for recording in plan.history.recordings:
        for made in recording.made:
            tensor = made()
            if tensor is None or not is_recorded(tensor) or tensor.grad_fn is not None:
                continue
            mark = mark_of(tensor)
            if mark is None or id(tensor) in held or mark.key in engine or mark.key in plan.history.broken:
                continue
            if is_plain(tensor) and mark.explains(0 if tensor.is_inference() else tensor._version):
                found[id(tensor)] = tensor
                plan.decisions[id(tensor)] = Decision(tensor, Fate.RESTORED)
    return list(found.values())


def _decide(plan: Plan, tensor: torch.Tensor, device: torch.device, *, blank: bool) -> Decision:
    reason = _unsupported(tensor, device)
    if not tensor.is_meta:
        here = tensor.device == device or bool(reason) or is_dtensor(tensor)
        return Decision(tensor, Fate.KEPT if here and plan.dtype_of(tensor) is tensor.dtype else Fate.MOVED)
    if reason:
        return Decision(tensor, Fate.UNSUPPORTED, reason)
    if blank:
        return Decision(tensor, Fate.UNINITIALIZED)
    local = plan.local(tensor)
    mark = mark_of(local)
    if mark is None:
        return Decision(tensor, Fate.MISSING, _UNRECORDED_SHARD if is_dtensor(tensor) else _UNRECORDED)
    if mark.key in plan.history.broken:
        return Decision(tensor, Fate.MISSING, plan.history.broken[mark.key])
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
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return f"{type(tensor).__name__} tensors are not supported"
    return "" if is_plain(tensor) else f"its layout is {tensor.layout}, or it is quantized or conjugated: not supported"


def build(
    plan: Plan, device: torch.device, report: Callable[[int], None]
) -> tuple[dict[int, torch.Tensor], dict[int, Fate]]:
    """Make the real tensors; the module is not touched.

    Args:
        plan: what to make.
        device: where.
        report: called with the number of bytes of each storage that has its value.

    Returns:
        The replacements, and the fate of every tensor as it turned out; both by the old tensor's id.
    """
    fates = {key: decision.fate for key, decision in plan.decisions.items()}
    chosen = {key: decision.tensor for key, decision in plan.decisions.items() if decision.fate is not Fate.KEPT}
    keys = {key: _key(plan, tensor) for key, tensor in chosen.items() if fates[key] is Fate.RESTORED}
    casts: dict[int, tuple[torch.dtype, torch.dtype]] = {}
    if plan.dtype is not None:
        dtypes: dict[int, set[torch.dtype]] = {}
        for key, storage in keys.items():
            dtypes.setdefault(storage, set()).add(chosen[key].dtype)
        for storage, (only, *others) in dtypes.items():
            if only.is_floating_point and not others:
                casts[storage] = only, plan.dtype
    replayed = replay(plan.history, keys.values(), device, draws=plan.draws, casts=casts, report=report)
    storages = {address_of(plan.local(chosen[key])): replayed.storages[keys[key]] for key in keys}
    restored = frozenset(storages)
    replacements = {}
    with torch.no_grad():
        for key, tensor in chosen.items():
            local = plan.local(tensor)
            address = address_of(local)
            dtype = plan.dtype_of(tensor)
            if address not in storages:
                storages[address] = _new_storage(local, dtype, device)
                report(storages[address].nbytes())
            described = view_of(local, 0)
            if fates[key] is not Fate.RESTORED or keys[key] in replayed.cast:
                described = replace(described, dtype=dtype)
            view = as_tensor(described, storages[address]).to(dtype)  # memory that has two dtypes is cast here
            if address not in restored and fates[key] is not Fate.MOVED:
                fill(view)
            replacements[key] = _like(tensor, view)
    fates.update({key: Fate.UNINITIALIZED for key in keys if keys[key] in replayed.unwritten})
    return replacements, fates


def _key(plan: Plan, tensor: torch.Tensor) -> int:
    mark = mark_of(plan.local(tensor))
    return -1 if mark is None else mark.key


def _new_storage(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.UntypedStorage:
    """As many elements as the tensor's storage has on ``device``, and the same values if that has any."""
    old = tensor.untyped_storage()
    numel = old.nbytes() // tensor.element_size()
    if tensor.is_meta:
        return torch.UntypedStorage(numel * dtype.itemsize, device=device)  # type: ignore[no-untyped-call]
    whole = as_tensor(View(0, tensor.dtype, (numel,), (1,), 0), old)
    return whole.to(device, dtype, copy=True).untyped_storage()


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
        new = torch.Tensor._make_subclass(plain_type(old), view, requires_grad)
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)
    return new


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, GuardedTensor, GuardedParameter})


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing that module: a DTensor exists only if somebody did."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this rank holds: the shard of a DTensor, any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor

"""From meta to a real device: give every tensor of a module the value that construction would have given it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_ondevice._plan import Fate, build, make_plan
from ds_ondevice._slots import Slot, find_slots
from ds_ondevice.errors import UnrestorableError

_LOG = logging.getLogger("ds.ondevice")

_ADVICE = (
    "Build and initialise the module inside `with OnDevice(dtype, device='meta')`; or pass fallback=<a function that "
    "initialises the module it is given>; or pass strict=False to have these tensors filled with NaN (0 where the "
    "dtype has none) and listed in the report."
)


@dataclass(frozen=True)
class MaterializeReport:
    """What ``materialize`` did; every field but the first holds dotted names of parameters, buffers and attributes.

    Attributes:
        device: where the module is now.
        restored: have the value that construction gave them.
        moved: were real already, on another device, and were copied.
        initialized: had no known value; ``fallback`` was called on their module.
        uninitialized: hold no value, as construction gave them none (``torch.empty``) or ``init=False`` asked for
            none: filled with NaN, or 0 where the dtype has none. Load a checkpoint into them.
        missing: had a value that is not known (``strict=False`` only); filled in the same way.
    """

    device: torch.device
    restored: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    uninitialized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def materialize(
    module: torch.nn.Module,
    device: torch.device | str | int,
    *,
    init: bool = True,
    fallback: Callable[[torch.nn.Module], object] | None = None,
    strict: bool = True,
) -> MaterializeReport:
    """Move a module built inside ``OnDevice(device="meta")`` to a real device, values included.

    What construction ran on meta runs again on ``device``, in its order: the module gets, bit for bit, the values that
    it would have got without meta from the seed in force now. A part of a model gets the values that it has in the
    whole. Peak memory is the module's and a few temporary tensors. Tensors that shared memory share it again.
    Parameters are new objects (as after ``Module.to_empty``), so make optimizers afterwards; their attributes are
    kept, hooks and ``.grad`` are not. Parameters and buffers that were real already are moved.

    DTensor parameters (FSDP2) are restored if they were sharded inside the ``OnDevice`` block: a rank makes one whole
    parameter at a time and keeps its shard. No communication; ranks need not call it together, but need equal seeds.

    Args:
        module: changed in place.
        device: where to; not meta.
        init: False leaves parameters without a value, for a checkpoint to be loaded, and runs no initialiser; buffers
            and other tensors are computed all the same.
        fallback: called with each submodule that directly holds a tensor whose value is not known, once the whole
            module is on ``device``: ``lambda m: m.reset_parameters()`` for many of PyTorch's own.
        strict: raise where a value is not known and there is no ``fallback``.

    Returns:
        What was restored and what was not.

    Raises:
        UnrestorableError: see ``strict``; names every such tensor and the reason.
        ReplayError: an operator failed on ``device``.
        TypeError, ValueError: an argument is wrong. The module is unchanged after any of these errors, and after one
            of ``fallback``.

    Example:
        >>> import torch
        >>> from ds_ondevice import OnDevice, materialize
        >>> with OnDevice(torch.bfloat16, device="meta"):
        ...     model = torch.nn.Linear(4, 2)
        >>> materialize(model, "cpu").restored
        ('weight', 'bias')
        >>> model.weight.device.type, model.weight.dtype
        ('cpu', torch.bfloat16)
    """
    target = _check(module, device, fallback)
    slots = list(find_slots(module))
    holders = [(slot, tuple(slot.tensors())) for slot in slots]  # keeps the old tensors, which go by their ids
    plan = make_plan(slots, target, init=init)
    impossible = plan.reasons(slots, Fate.UNSUPPORTED)
    if impossible:
        raise UnrestorableError(impossible)
    unknown = plan.reasons(slots, Fate.MISSING)
    if unknown and fallback is None and strict:
        raise UnrestorableError(unknown, _ADVICE)
    replacements, fates = build(plan, target)
    before = [dict(vars(part)) for part in module.modules()]
    registries = [(part._parameters.copy(), part._buffers.copy()) for part in module.modules()]
    try:
        for slot in slots:
            slot.put(replacements)
        for part in module.modules():
            if isinstance(part, torch.nn.RNNBase):
                part.flatten_parameters()  # one chunk of memory, as its constructor makes it where cuDNN is used
        if fallback is not None:
            for owner in dict.fromkeys(slot.owner for slot in slots if slot.name in unknown):
                fallback(owner)
    except BaseException:  # the module as it was
        for part, attributes, (parameters, buffers) in zip(module.modules(), before, registries, strict=True):
            vars(part).update(attributes)
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        raise
    return _report(holders, fates, target, fell_back=fallback is not None)


def _report(
    holders: list[tuple[Slot, tuple[torch.Tensor, ...]]],
    fates: dict[int, Fate],
    device: torch.device,
    *,
    fell_back: bool,
) -> MaterializeReport:
    def names(fate: Fate) -> tuple[str, ...]:
        return tuple(slot.name for slot, tensors in holders if any(fates[id(tensor)] is fate for tensor in tensors))

    unknown = names(Fate.MISSING)
    report = MaterializeReport(
        device=device,
        restored=names(Fate.RESTORED),
        moved=names(Fate.MOVED),
        initialized=unknown if fell_back else (),
        uninitialized=names(Fate.UNINITIALIZED),
        missing=() if fell_back else unknown,
    )
    for what, some in (("uninitialized", report.uninitialized), ("missing", report.missing)):
        if some:
            _LOG.warning("materialize left %d tensor(s) %s, filled with NaN or 0: %s", len(some), what, _short(some))
    return report


def _check(module: object, device: torch.device | str | int, fallback: object) -> torch.device:
    """Check the arguments; return the device, with its index."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
    if fallback is not None and not callable(fallback):
        raise TypeError(f"fallback must be a function of one module, or None, not {fallback!r}")
    try:
        target = torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"device must name a torch device, not {device!r}: {error}") from None
    if target.type == "meta":
        raise ValueError("device must be a real device, not 'meta': the module gets memory there")
    return torch.empty(0, device=target).device


def _short(names: tuple[str, ...], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")

"""From meta to a real device: give every tensor of a module the value that construction would have given it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from ds_ondevice._plan import Fate, Plan, build, find_strays, is_dtensor, make_plan
from ds_ondevice._progress import Progress, reporter
from ds_ondevice._slots import Slot, find_parts, find_slots
from ds_ondevice._swap import Exchange
from ds_ondevice.errors import MaterializeError, UnrestorableError, listed

_LOG = logging.getLogger("ds.ondevice")

Init: TypeAlias = Literal["replay", "reset", "empty"]

_ADVICE = (
    "Build and initialise the module inside `with OnDevice(dtype, device='meta')`; or pass init='reset' to call the "
    "reset_parameters() of its parts; or pass fallback=<a function that initialises the module it is given>; or pass "
    "strict=False to have these tensors filled with NaN (0 where the dtype has none) and listed in the report."
)


@dataclass(frozen=True)
class MaterializeReport:
    """What ``materialize`` did; printed, it takes one screen.

    All fields but the first hold dotted names of parameters, buffers and attributes, if nothing else is said.

    Attributes:
        device: where the module is now.
        restored: have the value that construction gave them.
        moved: were real already, on another device or in another dtype, and were copied.
        initialized: had no known value, or none was wanted; ``fallback`` or ``reset_parameters`` was called on their
            module.
        uninitialized: hold no value, as construction gave them none (``torch.empty``) or ``init="empty"`` asked for
            none: filled with NaN, or 0 where the dtype has none. Load a checkpoint into them.
        missing: had a value that is not known (``strict=False`` only); filled in the same way.
        replaced: are new objects. The others are the objects that they were, so that optimizers and hooks go on.
        strays: dtype and shape of tensors that no module holds and that were given their values too, such as tables in
            an ``lru_cache`` or tensors in objects that are no modules.
    """

    device: torch.device
    restored: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    uninitialized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"on {self.device}"]
        for each in dataclasses.fields(self)[1:]:
            names = getattr(self, each.name)
            if names:
                lines.append(f"{each.name} {len(names)}: {listed(names)}")
        return "\n  ".join(lines)


def materialize(
    module: torch.nn.Module | torch.Tensor,
    device: torch.device | str | int,
    *,
    dtype: torch.dtype | None = None,
    init: Init = "replay",
    fallback: Callable[[torch.nn.Module], object] | None = None,
    strict: bool = True,
    progress: Progress = False,
) -> MaterializeReport:
    """Move a module built inside ``OnDevice(device="meta")`` to a real device, values included.

    What construction ran on meta runs again on ``device``, in its order: the module gets, bit for bit, the values that
    it would have got without meta from the seed in force now. A part of a model gets the values that it has in the
    whole. Peak memory is the module's and a few temporary tensors. Tensors that shared memory share it again.

    Parameters and buffers stay the objects that they are, with their hooks and attributes, so that an optimizer made
    before goes on. Where something else holds on to what a tensor was (an autograd graph, a weak reference), it
    becomes a new object, which the report lists. Recorded tensors that no module holds are given their values too:
    tables in an ``lru_cache``, tensors in objects that are no modules. Attributes that remember a device hold the new
    one.

    DTensor parameters (FSDP2, tensor parallel) are restored if they were sharded inside the ``OnDevice`` block, or by
    ``fully_shard`` after it: a rank makes one whole parameter at a time and keeps its shard. Then all ranks of their
    meshes must call this together. They compare what they recorded, and their seeds, before anything is drawn. For
    other modules there is no communication.

    Args:
        module: changed in place. One tensor may be given instead.
        device: where to; not meta.
        dtype: cast floating-point parameters and buffers to it, each once it has its value, as ``module.to(dtype)``
            after construction would.
        init: "replay" computes every value. "reset" calls ``reset_parameters()`` of every submodule that has one, in
            order; the parameters of others, and all buffers, are computed. "empty" leaves parameters without a value,
            for a checkpoint to be loaded, and draws no random number that no buffer needs.
        fallback: called with each submodule that directly holds a tensor whose value is not known, once the whole
            module is on ``device``: a model's own ``_init_weights``, for example.
        strict: raise where a value is not known and there is no ``fallback``.
        progress: True for a bar (or, without rich, log lines) on rank 0, or a function called with bytes done and bytes
            in all.

    Returns:
        What was restored and what was not.

    Raises:
        UnrestorableError: see ``strict``; names every such tensor and the reason.
        RecordingMismatchError: the ranks of a mesh did not record the same model, or have other seeds.
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
    if not isinstance(module, (torch.nn.Module, torch.Tensor)):
        raise TypeError(f"module must be a torch.nn.Module or a tensor, not {type(module).__name__}")
    if init not in get_args(Init) or isinstance(init, bool):
        raise TypeError(f"init must be 'replay', 'reset' or 'empty', not {init!r}")
    if fallback is not None and not callable(fallback):
        raise TypeError(f"fallback must be a function of one module, or None, not {fallback!r}")
    target = check_target(device, dtype)
    root = module if isinstance(module, torch.nn.Module) else _holder(module)
    parts = find_parts(root)
    slots = list(find_slots(parts))
    resets = [part for part in parts if init == "reset" and callable(getattr(part, "reset_parameters", None))]
    owners = set(map(id, resets))

    def blank(slot: Slot) -> bool:
        return slot.kind == "parameter" and (init == "empty" or id(slot.owner) in owners)

    plan = make_plan(parts, slots, target, blank=blank, draws=init == "replay", dtype=dtype)
    impossible = plan.reasons(slots, Fate.UNSUPPORTED)
    if impossible:
        raise UnrestorableError(impossible)
    unknown = plan.reasons(slots, Fate.MISSING)
    if unknown and fallback is None and strict:
        raise UnrestorableError(unknown, _ADVICE)
    if any(is_dtensor(tensor) for slot in slots for tensor in slot.held):
        from ds_ondevice._agree import check_ranks

        check_ranks(slots, plan, target)
    strays = find_strays(plan, parts, slots)
    with reporter(progress, "materialize") as tell:
        replacements, fates = build(plan, target, _Counter(plan, tell))
    exchange = Exchange(parts, slots, plan.history.recordings)
    try:
        replaced = exchange.put(replacements, target)
        for part in resets:
            part.reset_parameters()  # type: ignore[operator]
        if fallback is not None:
            for owner in dict.fromkeys(slot.owner for slot in slots if slot.name in unknown):
                fallback(owner)
        if root is not module and replaced:
            raise MaterializeError(
                "the tensor cannot be materialized in place: an autograd graph, a view or a weak "
                "reference holds on to it"
            )
    except BaseException:
        exchange.undo()
        raise
    finally:
        exchange.close()
    return _report(
        slots,
        fates,
        target,
        unknown=unknown,
        replaced=replaced,
        strays=strays,
        reset=owners,
        fell_back=fallback is not None,
    )


def is_deferred(module: torch.nn.Module | torch.Tensor) -> bool:
    """Whether a tensor, or any parameter, buffer or tensor attribute of a module, is on meta still.

    Example:
        >>> import torch
        >>> from ds_ondevice import OnDevice, is_deferred
        >>> with OnDevice(device="meta"):
        ...     model = torch.nn.Linear(4, 2)
        >>> is_deferred(model), is_deferred(torch.ones(1))
        (True, False)
    """
    if isinstance(module, torch.Tensor):
        return module.is_meta
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or a tensor, not {type(module).__name__}")
    return any(tensor.is_meta for slot in find_slots(find_parts(module)) for tensor in slot.held)


class _Counter:
    """Adds bytes up and tells."""

    def __init__(self, plan: Plan, tell: Callable[[int, int], object]) -> None:
        storages = {
            plan.local(each.tensor).untyped_storage()._cdata: plan.local(each.tensor).untyped_storage().nbytes()
            for each in plan.decisions.values()
            if each.fate is not Fate.KEPT
        }
        self._done, self._total, self._tell = 0, sum(storages.values()), tell

    def __call__(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        self._tell(self._done, self._total)


def _report(
    slots: list[Slot],
    fates: dict[int, Fate],
    device: torch.device,
    *,
    unknown: Iterable[str],
    replaced: set[int],
    strays: list[torch.Tensor],
    reset: set[int],
    fell_back: bool,
) -> MaterializeReport:
    def names(fate: Fate) -> tuple[str, ...]:
        return tuple(slot.name for slot in slots if any(fates[id(tensor)] is fate for tensor in slot.held))

    by_reset = {slot.name for slot in slots if slot.kind == "parameter" and id(slot.owner) in reset}
    report = MaterializeReport(
        device=device,
        restored=names(Fate.RESTORED),
        moved=names(Fate.MOVED),
        initialized=tuple(slot.name for slot in slots if slot.name in by_reset or (fell_back and slot.name in unknown)),
        uninitialized=tuple(name for name in names(Fate.UNINITIALIZED) if name not in by_reset),
        missing=() if fell_back else names(Fate.MISSING),
        replaced=tuple(slot.name for slot in slots if any(id(tensor) in replaced for tensor in slot.held)),
        strays=tuple(f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.") for tensor in strays),
    )
    for what, some in (("uninitialized", report.uninitialized), ("missing", report.missing)):
        if some:
            _LOG.warning("materialize left %d tensor(s) %s, filled with NaN or 0: %s", len(some), what, listed(some))
    lost = [tensor for tensor in strays if id(tensor) in replaced]
    if lost:
        _LOG.warning("materialize could not change %d tensor(s) that no module holds: they stay on meta", len(lost))
    return report


def _holder(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter("tensor", tensor)
    else:
        module.register_buffer("tensor", tensor)
    return module


def check_target(device: Any, dtype: object) -> torch.device:
    """Check where a module shall go; return the device, with its index."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, or None, not {dtype!r}")
    try:
        target = torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"device must name a torch device, not {device!r}: {error}") from None
    if target.type == "meta":
        raise ValueError("device must be a real device, not 'meta': the module gets memory there")
    return torch.empty(0, device=target).device

"""Stream safetensors files into a module: on meta or real, plain or sharded.

[Note: order of work] Everything that can be known to fail is checked first, from the headers of the files. Then real
tensors are made, as `materialize` makes them: without a value where the files have one, otherwise with the value that
construction gives. The files' bytes are copied into the new tensors, and into those of the module that are real
already. Only then do the new tensors take the place of those on meta. So a loaded model never exists twice, and a
module on meta is untouched until nothing can fail any more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_ondevice._fit import Fit, check_fit, state_of
from ds_ondevice._materialize import check_target
from ds_ondevice._plan import Fate, Plan, build, find_strays, is_dtensor, local_of, make_plan
from ds_ondevice._progress import Progress, reporter
from ds_ondevice._replay import plain_torch
from ds_ondevice._safetensors import Files, Region, files_of
from ds_ondevice._slots import Slot, find_parts, find_slots
from ds_ondevice._swap import Exchange
from ds_ondevice.errors import UnrestorableError, listed

_LOG = logging.getLogger("ds.ondevice")

_ADVICE = (
    "No file holds these tensors. Build the module inside `with OnDevice(dtype, device='meta')`, so that they can be "
    "computed; or pass strict=False to have them filled with NaN (0 where the dtype has none) and listed in the report."
)


@dataclass(frozen=True)
class LoadReport:
    """What ``load_into`` did on this rank; every field but the first and the last holds names.

    Attributes:
        device: where the module is now.
        loaded: were read from a file.
        tied: share the memory of one that was read, whether or not a file has them too.
        computed: are in no file, and have the value that construction gives them.
        uninitialized: are in no file, and nobody knows a value (``strict=False``, or construction used
            ``torch.empty``): filled with NaN, or 0 where the dtype has none.
        missing: of the module's state dict, are in no file (``strict=False`` only). On meta they are ``computed`` or
            ``uninitialized`` too; if they were real they are as they were.
        unexpected: are in a file and not in the module (``strict=False`` only).
        replaced: are new objects, as in `MaterializeReport`.
        nbytes: how many bytes of the files this rank read.
    """

    device: torch.device
    loaded: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    uninitialized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    nbytes: int = 0

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors, {self.nbytes} bytes on this rank, to {self.device}"]
        for what in ("tied", "computed", "uninitialized", "missing", "unexpected", "replaced"):
            names = getattr(self, what)
            if names:
                lines.append(f"  {len(names)} {what}: {listed(names)}")
        return "\n".join(lines)


def load_into(
    module: torch.nn.Module,
    path_or_paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    device: torch.device | str | int,
    *,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    progress: Progress = False,
) -> LoadReport:
    """Load safetensors files into a module, which may be on meta and may be sharded.

    Parameters and persistent buffers, by their names in ``module.state_dict()``, come from the files. If the module is
    on meta it goes to ``device`` as by ``materialize``, and what no file holds (non-persistent buffers, plain
    attributes) is computed from its recording. Ties stay ties, and a file need have only one name of a tie; of several
    the last in the state dict is read, as ``load_state_dict`` has it. Memory above the module's: one block of 64 MiB.

    Of a DTensor (FSDP2, tensor parallel, both) a rank reads its own shard only. There is no communication, and ranks
    need not call it together. The exception is a sharded module on meta with missing parameters (``strict=False``): to
    compute these, all ranks of its meshes must call it, with equal seeds, as they must call ``materialize``.

    Args:
        module: changed in place. What is real already, on ``device`` and in the right dtype, is overwritten in place.
        path_or_paths: a .safetensors file, an index (``model.safetensors.index.json``), a folder with an index or with
            .safetensors files, or a list of files that have no name in common.
        device: where to; not meta. Real tensors elsewhere are moved; real DTensors stay where they are.
        strict: raise where names are missing or unexpected. Otherwise unexpected names are ignored; a missing tensor
            that is real is left alone, and one on meta gets the value that construction would have given it with the
            seed in force now, or NaN if that is not known.
        dtype: cast floating-point parameters and buffers to it, as in ``materialize``; None keeps the module's own.
            What is stored in another floating-point dtype is converted. No integer is made floating-point, nor the
            reverse, nor put where it may not fit.
        progress: True for a bar (or, without rich, log lines) on rank 0, or a function called with bytes done and bytes
            in all of this rank.

    Returns:
        What came from where.

    Raises:
        LoadError: names, shapes, dtypes or placements do not fit; all of them in one error.
        UnrestorableError: no file holds a tensor on meta, and its value is not known.
        RecordingMismatchError, ReplayError: what no file holds could not be computed.
        OSError: a file is not there, incomplete, not safetensors, or changed while it was read.
        TypeError, ValueError: an argument is wrong, or two files hold the same name.
        ImportError: safetensors is not installed. After any error, one of ``progress`` or an interrupt as well, what
            was on meta is on meta, unchanged. Tensors that are real can be half overwritten only by an interrupt, an
            error of ``progress``, or an OSError of a file that was whole at first.

    Example:
        >>> import os, tempfile, torch
        >>> from ds_ondevice import OnDevice, load_into
        >>> from safetensors.torch import save_file
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"weight": torch.ones(2, 4), "bias": torch.zeros(2)}, path)
        >>> with OnDevice(torch.bfloat16, device="meta"):
        ...     model = torch.nn.Linear(4, 2)
        >>> print(load_into(model, path, "cpu"))
        loaded 2 tensors, 40 bytes on this rank, to cpu
        >>> model.weight.dtype, model.weight.sum().item()
        (torch.bfloat16, 8.0)
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
    target = check_target(device, dtype)
    with Files(files_of(path_or_paths)) as files:
        parts = find_parts(module)
        state, slots = state_of(module), list(find_slots(parts))
        fit = check_fit(state, slots, files.tensors, dtype, strict=strict)
        plan = _make_plan(parts, slots, fit, target, dtype, strict=strict)
        strays = find_strays(plan, parts, slots)
        replacements, fates = build(plan, target, lambda nbytes: None)
        targets = {name: local_of(replacements.get(id(state[name]), state[name])) for name in fit.reads}
        nbytes = _read(files, fit.reads, targets, progress)
    exchange = Exchange(parts, slots, plan.history.recordings)
    replaced = exchange.put(replacements, target)
    exchange.close()
    lost = [tensor for tensor in strays if id(tensor) in replaced]
    if lost:
        _LOG.warning("load_into could not change %d tensor(s) that no module holds: they stay on meta", len(lost))
    others = {slot.name: {fates[id(tensor)] for tensor in slot.held} for slot in slots if slot.name not in fit.provided}
    unknown = tuple(name for name, found in others.items() if found & {Fate.UNINITIALIZED, Fate.MISSING})
    if unknown:
        _LOG.warning(
            "load_into left %d tensor(s) without a value, filled with NaN or 0: %s", len(unknown), listed(unknown)
        )
    return LoadReport(
        device=target,
        loaded=tuple(fit.reads),
        tied=fit.tied,
        computed=tuple(name for name, found in others.items() if Fate.RESTORED in found),
        uninitialized=unknown,
        missing=fit.missing,
        unexpected=fit.unexpected,
        replaced=tuple(slot.name for slot in slots if any(id(tensor) in replaced for tensor in slot.held)),
        nbytes=nbytes,
    )


def _read(files: Files, reads: Mapping[str, Region], targets: Mapping[str, torch.Tensor], progress: Progress) -> int:
    """Copy parts of tensors from the files to ``targets``; return how many bytes were read."""
    done, total = 0, sum(files.nbytes(name, region) for name, region in reads.items())
    with reporter(progress, "load_into") as tell, plain_torch():
        tell(done, total)
        for name, region in reads.items():
            for nbytes in files.read(name, region, targets[name]):
                done += nbytes
                tell(done, total)
    return done


def _make_plan(
    parts: Mapping[torch.nn.Module, str],
    slots: list[Slot],
    fit: Fit,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    strict: bool,
) -> Plan:
    """Decide about every tensor; those that have their values from the files need none from the recording.

    Raises:
        UnrestorableError: a tensor cannot be made, or has no known value.
        RecordingMismatchError: as in `materialize`, where sharded tensors are computed.
    """
    plan = make_plan(parts, slots, device, blank=lambda slot: slot.name in fit.provided, draws=fit.draws, dtype=dtype)
    impossible = plan.reasons(slots, Fate.UNSUPPORTED)
    if impossible:
        raise UnrestorableError(impossible)
    unknown = plan.reasons(slots, Fate.MISSING)
    if unknown and strict:
        raise UnrestorableError(unknown, _ADVICE)
    if fit.draws and any(is_dtensor(tensor) for slot in slots for tensor in slot.held):
        from ds_ondevice._agree import check_ranks  # imports torch.distributed

        check_ranks(slots, plan, device)
    return plan

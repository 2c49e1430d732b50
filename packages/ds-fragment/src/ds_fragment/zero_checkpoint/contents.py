"""Everything that the files of a checkpoint have of the model, put together."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_fragment.errors import CheckpointError, FragmentError
from ds_fragment.zero_checkpoint.folder import Folder
from ds_fragment.zero_checkpoint.sources import Contents, Piece, Source, whole
from ds_fragment.zero_checkpoint.stages import EXPERT, VALUE, locate, source_of
from ds_fragment.zero_checkpoint.state import optimizer_state
from ds_fragment.zero_checkpoint.universal import universal
from ds_fragment.zero_checkpoint.unpickle import Stored, read_pt


def read_contents(folder: Folder, *, optimizer: bool = False, exclude_frozen: bool = False) -> Contents:
    """Where everything in a checkpoint is; what it holds is not read.

    Raises:
        CheckpointError: a file is damaged or does not fit the others, or a parameter has no values; it is named.
    """
    try:
        contents = _contents(folder, optimizer)
    except FragmentError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"'{folder.path}' is damaged, or of a DeepSpeed that is not known: {type(error).__name__}: {error}"
        ) from error
    if exclude_frozen:
        contents.frozen.clear()
        contents.tied = {alias: name for alias, name in contents.tied.items() if name in contents.trained}
    return contents


def _contents(folder: Folder, optimizer: bool) -> Contents:
    models = [_model(path) for path in folder.model]
    contents = Contents()
    zero = models[0].get("param_shapes") is not None
    if folder.zero is not None:
        universal(folder, models[0], contents, optimizer)
    elif zero and folder.optimizer:
        located, files = locate(folder, models)
        for name, found in located.items():
            contents.trained[name] = source_of(name, found, files, VALUE)
        if optimizer:
            optimizer_state(located, files, contents)
    elif zero:
        raise CheckpointError(
            f"'{folder.path}' has no *_optim_states.pt, where the fp32 weights of its ZeRO checkpoint would be"
        )
    else:
        _without_zero(folder, models[0], optimizer)
    _module(folder, models, contents)
    return contents


def _model(path: Path) -> dict[str, Any]:
    found = read_pt(path)
    if not isinstance(found, dict) or not isinstance(found.get("module"), dict):
        raise CheckpointError(f"'{path}' is not the model state of a DeepSpeed checkpoint: it has no 'module'")
    if found.get("ds_autoep_layers") or found.get("autoep_layers"):
        raise CheckpointError(f"'{path}' is of a model with AutoEP experts, which cannot be consolidated")
    return found


def _without_zero(folder: Folder, model: Mapping[str, Any], optimizer: bool) -> None:
    """Refuse what the weights of the module do not have: they are read as they are."""
    path = folder.model[0]
    kept = model.get("optimizer")
    if isinstance(kept, dict) and any(key.startswith("fp32_groups") for key in kept):
        raise CheckpointError(
            f"'{path}' was saved without ZeRO: its fp32 weights are in the optimizer state, which does not say whose "
            "they are. Load it with DeepSpeed, and save the model with ds_fragment.save_full"
        )
    if optimizer:
        raise CheckpointError(
            f"'{path}' was saved without ZeRO: its optimizer state does not say whose it is. Leave optimizer=True out"
        )


def _module(folder: Folder, models: Sequence[Mapping[str, Any]], contents: Contents) -> None:
    """Add what only the module has: buffers, frozen parameters, and second names."""
    model, path = models[0], folder.model[0]
    module: dict[str, Any] = {name: value for name, value in model["module"].items() if isinstance(value, Stored)}
    for file in folder.experts.values():
        module |= _experts(file)
    for name in contents.trained:
        if EXPERT.fullmatch(name) and name not in module:
            raise CheckpointError(
                f"'{folder.path}' has no layer_*_expert_*_model_states.pt with '{name}': it is missing"
            )
    buffers = set(map(_kind, model.get("buffer_names") or ()))
    contents.buffers = {name: whole(name, stored) for name, stored in module.items() if _kind(name) in buffers}
    _frozen_fragments(folder, models, contents)
    seen: dict[tuple[Any, ...], str] = {}
    shared = _shared(model, contents)
    known = ChainMap(contents.frozen, contents.trained)
    for name, stored in module.items():
        if name in contents.buffers or name in known:
            continue
        place = (stored.path, stored.offset, stored.shape, stored.stride)
        others = [other for other in (*shared.get(name, ()), seen.get(place)) if other in known]
        if others and _is_same(stored, known[others[0]], folder):
            contents.tied[name] = others[0]
            continue
        if folder.parallel or (folder.is_zero3 and stored.shape.numel() == 0):
            raise CheckpointError(
                f"'{name}' is in the module of '{path}', but nothing in '{folder.path}' has all of its values"
            )
        contents.frozen[name] = whole(name, stored)
        if stored.shape.numel():
            seen[place] = name


def _kind(name: str) -> str:
    """The name, without the number of an expert: the model's lists have only those of one rank."""
    matched = EXPERT.fullmatch(name)
    return f"{matched[1]}*{matched[3]}" if matched else name


def _is_same(stored: Stored, other: Source, folder: Folder) -> bool:
    """Whether two names are of one parameter; DeepSpeed says so of any two without elements, too."""
    return folder.is_zero3 or stored.shape == other.shape


def _shared(model: Mapping[str, Any], contents: Contents) -> dict[str, list[str]]:
    """For each name the others of the same parameter; those of an expert for the experts of all ranks."""
    found: dict[str, list[str]] = {}
    for alias, name in (model.get("shared_params") or {}).items():
        found.setdefault(alias, []).append(name)
        found.setdefault(name, []).append(alias)
        second, first = EXPERT.fullmatch(alias), EXPERT.fullmatch(name)
        for other in contents.trained if first and second else ():
            matched = EXPERT.fullmatch(other)
            if first and second and matched and (matched[1], matched[3]) == (first[1], first[3]):
                found.setdefault(f"{second[1]}{matched[2]}{second[3]}", []).append(other)
    return found


def _experts(path: Path) -> dict[str, Stored]:
    """The model's own weights of an expert: only names of it that have no fp32 weights are taken from them."""
    found = read_pt(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' is not the state of an expert")
    return {name: value for name, value in found.items() if isinstance(value, Stored)}


def _frozen_fragments(folder: Folder, models: Sequence[Mapping[str, Any]], contents: Contents) -> None:
    """Frozen parameters that are listed: in ZeRO-3 a part on each rank, else whole."""
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        size = torch.Size(shape)
        part = -(-size.numel() // len(models))
        pieces: list[Piece] = []
        for rank, (path, model) in enumerate(zip(folder.model, models, strict=True)):
            fragment = (model.get("frozen_param_fragments") or {}).get(name)
            needed = max(0, min(part, size.numel() - rank * part))
            if not isinstance(fragment, Stored) or fragment.shape.numel() < needed:
                raise CheckpointError(f"'{path}' has not all of its values of the frozen parameter '{name}'")
            if fragment.shape == size:  # not partitioned, or all of it on one rank
                contents.frozen[name] = whole(name, fragment)
                break
            pieces.append(Piece(fragment, 0, needed))
        else:
            contents.frozen[name] = Source(name, size, pieces[0].stored.dtype, tuple(pieces))

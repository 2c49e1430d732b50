"""Universal checkpoints: a folder for each parameter, with a file for the weights and for each key of the state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_fragment.errors import CheckpointError
from ds_fragment.zero_checkpoint.folder import Folder
from ds_fragment.zero_checkpoint.sources import Contents, Piece, Source, whole
from ds_fragment.zero_checkpoint.stages import EXPERT
from ds_fragment.zero_checkpoint.state import group_steps, param_groups
from ds_fragment.zero_checkpoint.unpickle import Stored, is_scalar, read_pt


def universal(folder: Folder, model: Mapping[str, Any], contents: Contents, optimizer: bool) -> None:
    """Add the trained parameters, and where it is asked for their optimizer state.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    assert folder.zero is not None
    listed = model.get("param_shapes") or []
    shapes = {name: (torch.Size(shape), group) for group, names in enumerate(listed) for name, shape in names.items()}
    _require_right(folder, model, shapes)
    keys: dict[str, None] = {}
    for name in shapes:
        contents.trained[name] = _universal_source(folder.zero / name, name, "fp32", shapes)
        keys.update(dict.fromkeys(sorted(file.stem for file in (folder.zero / name).glob("*.pt"))))
    if not optimizer:
        return
    path = folder.zero / "optimizer_state.pt"
    saved = read_pt(path)
    inner = saved.get("optimizer_state_dict") or {}
    states = inner.get("state", {}) if isinstance(inner, dict) else {}
    for key in keys:
        for name in shapes if key not in ("fp32", "step") else ():
            contents.state.append(_universal_source(folder.zero / name, f"{name}/{key}", key, shapes))
    for name in shapes:
        step = folder.zero / name / "step.pt"
        value = read_pt(step) if step.exists() else states.get(shapes[name][1], {}).get("step")
        if is_scalar(value):
            contents.scalars[f"{name}/step"] = value
    contents.param_groups = param_groups(saved.get("param_groups") or [], {name: shapes[name][1] for name in shapes})
    group_steps(contents)


def _require_right(folder: Folder, model: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse what DeepSpeed's conversion mixes up (up to 0.19.8)."""
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    ranks = model.get("dp_world_size", 1)
    reason = None
    if isinstance(zero, dict) and zero.get("round_robin_gradients") and not folder.is_zero3 and ranks > 1:
        reason = "round_robin_gradients"
    if any(map(EXPERT.fullmatch, names)):
        reason = "experts"
    if reason is not None:
        raise CheckpointError(
            f"'{folder.path}' was made from a checkpoint with {reason}, which DeepSpeed's conversion mixes up: "
            "consolidate the checkpoint that it was made from"
        )


def _universal_source(path: Path, name: str, key: str, shapes: Mapping[str, tuple[torch.Size, int]]) -> Source:
    file = path / f"{key}.pt"
    found = read_pt(file)
    stored = found.get("param") if isinstance(found, dict) else found
    shape = shapes[path.name][0]
    if not isinstance(stored, Stored):
        raise CheckpointError(f"'{file}' has no tensor")
    if isinstance(found, dict) and (len(found) > 1 or stored.shape == shape):
        return whole(name, stored)
    if stored.shape.numel() != shape.numel() or not stored.is_contiguous:
        raise CheckpointError(f"'{file}' has shape {tuple(stored.shape)}, but '{path.name}' has {tuple(shape)}")
    return Source(name, shape, stored.dtype, (Piece(stored, 0, shape.numel()),))

"""Optimizer state by the names of the parameters, and the hyperparameters of their groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_fragment.errors import CheckpointError
from ds_fragment.zero_checkpoint.sources import Contents
from ds_fragment.zero_checkpoint.stages import Located, OptimizerFile, source_of
from ds_fragment.zero_checkpoint.unpickle import Stored, is_scalar, number


def optimizer_state(located: Mapping[str, Located], files: Sequence[OptimizerFile], contents: Contents) -> None:
    """Add the optimizer state and the groups.

    Raises:
        CheckpointError: a part of it is neither a value for each element nor a number.
    """
    keys: dict[str, None] = {}
    for found in located.values():
        for place in found.places[:1]:
            keys.update(dict.fromkeys(files[place.rank].of_group(place.group)))
    for key in keys:
        for name, found in located.items():
            if not found.places:
                continue
            place = found.places[0]
            value = files[place.rank].of_group(place.group).get(key)
            size = files[place.rank].masters[place.group].shape.numel()
            if isinstance(value, Stored) and value.shape.numel() >= size and len(value.shape) == 1:
                contents.state.append(source_of(name, found, files, key))
            elif is_scalar(value):
                contents.scalars[f"{name}/{key}"] = value
            elif value is not None:
                raise CheckpointError(
                    f"'{files[place.rank].path}' has '{key}' of '{name}' as {_described(value)}, which is not a value "
                    "for each element nor a number: leave optimizer=True out"
                )
    groups = files[0].inner.get("param_groups", []) if isinstance(files[0].inner, dict) else []
    contents.param_groups = param_groups(groups, {name: found.group for name, found in located.items()})
    group_steps(contents)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Stored) else type(value).__name__


def group_steps(contents: Contents) -> None:
    """Some optimizers keep the number of steps with the group."""
    for group in contents.param_groups:
        for name in group["params"] if isinstance(group.get("step"), (int, float)) else ():
            contents.scalars.setdefault(f"{name}/step", group["step"])


def param_groups(groups: Sequence[Mapping[str, Any]], group_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """The groups with names, and with what JSON can hold."""
    found = []
    for group in groups:
        flat = group.get("params", [])
        names = [name for name, index in group_of.items() if index in flat]
        plain = {key: _plain(value) for key, value in group.items() if key != "params" and _is_plain(value)}
        found.append({"params": names, **plain})
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bool, int, float)) or is_scalar(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return number(value) if isinstance(value, Stored) else value

"""Where the pieces of each parameter, and of its optimizer state, lie in the files of a checkpoint.

[Note: ZeRO-1/2] Each parameter group is one flat vector: its parameters one after the other, in the order of
``param_shapes``, each followed by the padding of ``param_alignment_paddings`` where there is one. Rank r has the r-th
of equal partitions; what it stores is shortened by the padding at the vector's end. Round-robin partitioning permutes
``param_shapes`` too. The ``param_slice_mappings`` in the same files are of the order before that permutation, so they
are not used. Groups of experts have a vector for each expert-parallel rank, over the ranks that share its experts.

[Note: ZeRO-3] Each parameter is cut into equal parts, one a rank, the last ones padded. Each rank's parts follow each
other in the order of ``param_shapes``, in flat vectors of one sub-group each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_fragment.errors import CheckpointError
from ds_fragment.zero_checkpoint.folder import Folder
from ds_fragment.zero_checkpoint.sources import Piece, Source
from ds_fragment.zero_checkpoint.unpickle import Stored, is_scalar, number, read_pt

EXPERT = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")
VALUE = ""  # the key of the weights, among those of optimizer state
_MASTERS = {3: "fp32_flat_groups", 2: "single_partition_of_fp32_groups"}


@dataclass(frozen=True)
class Place:
    """A run of elements of one flat vector of one rank."""

    rank: int
    group: int  # of parameters, or the sub-group in ZeRO-3
    start: int
    numel: int


@dataclass(frozen=True)
class Located:
    """A parameter and the runs that it is made of, in order."""

    shape: torch.Size
    group: int
    places: tuple[Place, ...]


@dataclass
class OptimizerFile:
    """One rank's file: its flat vectors and their state."""

    path: Path
    state: dict[str, Any]  # the dict under "optimizer_state_dict"
    stage: int

    @property
    def masters(self) -> list[Stored]:
        """The flat fp32 vectors."""
        found: list[Stored] = self.state[_MASTERS[self.stage]]
        return found

    @property
    def inner(self) -> Any:
        """The state dict of the optimizer that steps: groups of one flat vector (or more in ZeRO-3)."""
        return self.state.get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state")

    def of_group(self, group: int) -> dict[str, Any]:
        """What is kept for one flat vector."""
        inner = self.inner
        if isinstance(inner, list):  # an elastic checkpoint
            return inner[group] if group < len(inner) else {}
        found: dict[str, Any] = inner.get("state", {}).get(group, {}) if isinstance(inner, dict) else {}
        return found

    def column(self, group: int, key: str) -> Any:
        """The flat weights of a group, or their state of that key."""
        return self.masters[group] if key == VALUE else self.of_group(group).get(key)


def locate(folder: Folder, models: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Located], list[OptimizerFile]]:
    """Where each trained parameter is in the files of the ranks.

    Raises:
        CheckpointError: the files are damaged, or not of one save.
    """
    files = [_optimizer(path) for path in folder.optimizer]
    _same_save(folder, models, files)
    located = (_zero3 if files[0].stage == 3 else _zero12)(folder, files, models[0])
    _require_steps(files)
    return located, files


def _optimizer(path: Path) -> OptimizerFile:
    found = read_pt(path)
    state = found.get("optimizer_state_dict") if isinstance(found, dict) else None
    for stage, key in _MASTERS.items():
        masters = state.get(key) if isinstance(state, dict) else None
        if isinstance(masters, list) and all(isinstance(each, Stored) for each in masters):
            assert isinstance(state, dict)
            if state.get("ds_zero_partition_groups"):
                raise CheckpointError(f"'{path}' is of a model with AutoEP experts, which cannot be consolidated")
            if not all(each.is_contiguous for each in masters):
                raise CheckpointError(f"'{path}' is damaged: its flat weights are not contiguous")
            return OptimizerFile(path, state, stage)
    raise CheckpointError(f"'{path}' is not the optimizer state of a ZeRO checkpoint: it has no flat fp32 weights")


def _same_save(folder: Folder, models: Sequence[Mapping[str, Any]], files: Sequence[OptimizerFile]) -> None:
    """Refuse files that are not of one save."""
    for each in files:
        count = each.state.get("partition_count", len(files))
        ranks = max(count) if isinstance(count, list) else count
        if ranks != len(files):
            raise CheckpointError(
                f"'{each.path}' is of {ranks} data-parallel ranks, but '{folder.path}' has the files of {len(files)}: "
                f"{'some are missing' if ranks > len(files) else 'they are of different saves'}"
            )
        if each.stage != files[0].stage or len(each.masters) != len(files[0].masters):
            raise CheckpointError(f"'{each.path}' and '{files[0].path}' are of different saves: other groups")
    groups = len(models[0]["param_shapes"])
    if groups != len(files[0].masters):
        raise CheckpointError(
            f"'{folder.model[0]}' has the shapes of {groups} groups, '{files[0].path.name}' "
            f"has {len(files[0].masters)}: they are of different saves"
        )
    if files[0].stage == 3 and len(models) != len(files):
        raise CheckpointError(
            f"'{folder.path}' has {len(models)} *_model_states.pt and {len(files)} *_optim_states.pt: some are missing"
        )
    for path, model in zip(folder.model, models, strict=True):
        if model.get("global_steps") != models[0].get("global_steps"):
            raise CheckpointError(
                f"'{path}' is of step {model.get('global_steps')}, '{folder.model[0].name}' of step "
                f"{models[0].get('global_steps')}: they are of different saves"
            )


def _require_steps(files: Sequence[OptimizerFile]) -> None:
    """Refuse ranks whose optimizers made other numbers of steps: one of the files is of another save."""
    for group in range(len(files[0].masters)):
        found = {each.path: each.of_group(group).get("step") for each in files}
        steps = {path: number(step) for path, step in found.items() if is_scalar(step)}
        first = next(iter(steps.items()), None)
        for path, step in steps.items():
            if first is not None and step != first[1]:
                raise CheckpointError(
                    f"'{path}' is of optimizer step {step:g}, '{first[0].name}' of step {first[1]:g}: they are of "
                    "different saves"
                )


def _zero12(folder: Folder, files: Sequence[OptimizerFile], model: Mapping[str, Any]) -> dict[str, Located]:
    """See [Note: ZeRO-1/2]."""
    shapes = model["param_shapes"]
    located: dict[str, Located] = {}
    counts = files[0].state.get("partition_count", len(files))
    for group, names in enumerate(shapes):
        count = counts[group] if isinstance(counts, list) else counts
        paddings = files[0].state.get("param_alignment_paddings")
        gaps = paddings[group] if paddings else [0] * len(names)
        expert_ranks = len(files) // count
        local = _local_experts(names)
        for expert_rank, ranks in enumerate(_expert_groups(model, len(files), expert_ranks)):
            _require_equal(files, ranks, group)
            offset = 0
            for (name, shape), gap in zip(names.items(), gaps, strict=True):
                full = name if expert_ranks == 1 else _global_name(name, expert_rank, local, folder)
                numel = torch.Size(shape).numel()
                places = tuple(_partitions(files, ranks, group, offset, numel, full))
                located[full] = Located(torch.Size(shape), group, places)
                offset += numel + gap
            _require_all_used(files, ranks, group, offset)
    return located


def _expert_groups(model: Mapping[str, Any], ranks: int, expert_ranks: int) -> list[list[int]]:
    """For each expert-parallel rank, the data-parallel ranks that share its experts."""
    config = model.get("ds_config")
    if isinstance(config, dict) and config.get("use_data_before_expert_parallelism"):
        shared = ranks // expert_ranks
        return [list(range(rank * shared, (rank + 1) * shared)) for rank in range(expert_ranks)]
    return [list(range(rank, ranks, expert_ranks)) for rank in range(expert_ranks)]


def _local_experts(names: Iterable[str]) -> dict[str, int]:
    """How many experts a rank has of each layer, by the beginning of their names."""
    found: dict[str, int] = {}
    for matched in filter(None, map(EXPERT.fullmatch, names)):
        found[matched[1]] = max(found.get(matched[1], 0), int(matched[2]) + 1)
    return found


def _global_name(name: str, expert_rank: int, local: Mapping[str, int], folder: Folder) -> str:
    """The name of an expert among all, from its name among those of its rank."""
    matched = EXPERT.fullmatch(name)
    if matched is None:
        raise CheckpointError(
            f"'{name}' in '{folder.model[0]}' differs from one expert-parallel rank to the next, but is not one of "
            "DeepSpeed's experts: it cannot be named"
        )
    return f"{matched[1]}{expert_rank * local[matched[1]] + int(matched[2])}{matched[3]}"


def _partitions(
    files: Sequence[OptimizerFile], ranks: Sequence[int], group: int, offset: int, numel: int, name: str
) -> Iterator[Place]:
    """What the ranks have of a flat vector's interval."""
    begin, end = 0, offset + numel
    for rank in ranks:
        size = files[rank].masters[group].shape.numel()
        start, stop = max(offset, begin), min(end, begin + size)
        if start < stop:
            yield Place(rank, group, start - begin, stop - start)
        begin += size
    if begin < end:
        raise CheckpointError(
            f"'{name}' needs elements {offset} to {end} of group {group}, but the ranks hold {begin}: "
            f"'{files[ranks[-1]].path}' and its like are of another save, or not complete"
        )


def _require_equal(files: Sequence[OptimizerFile], ranks: Sequence[int], group: int) -> None:
    """Only the vector's end may be missing from its partitions."""
    sizes = [files[rank].masters[group].shape.numel() for rank in ranks]
    full = max(sizes)
    short = next((i for i, size in enumerate(sizes) if size < full), len(sizes))
    if any(sizes[short + 1 :]):
        raise CheckpointError(
            f"'{files[ranks[short]].path}' has {sizes[short]} elements of group {group}, other ranks have {full}: the "
            "files are of different saves"
        )


def _require_all_used(files: Sequence[OptimizerFile], ranks: Sequence[int], group: int, used: int) -> None:
    """The partitions are those of the parameters, and no more than padding besides."""
    sizes = [files[rank].masters[group].shape.numel() for rank in ranks]
    left = sum(sizes) - used
    paddings = [files[rank].state.get("group_paddings") for rank in ranks]
    if all(isinstance(each, list) for each in paddings):
        fits = left in (0, sum(each[group] for each in paddings if each))
    else:
        fits = 0 <= left < 2 * len(ranks)  # padded to twice the number of ranks
    if not fits:
        raise CheckpointError(
            f"the ranks hold {sum(sizes)} elements of group {group}, but its parameters have {used}: "
            f"'{files[ranks[0]].path}' is of another save than the model state"
        )


def _zero3(folder: Folder, files: Sequence[OptimizerFile], model: Mapping[str, Any]) -> dict[str, Located]:
    """See [Note: ZeRO-3]."""
    shapes = model["param_shapes"]
    located: dict[str, Located] = {}
    sizes = [[each.shape.numel() for each in file.masters] for file in files]
    for file, own in zip(files, sizes, strict=True):
        if own != sizes[0]:
            raise CheckpointError(
                f"'{file.path}' has flat weights of {own} elements, '{files[0].path.name}' of {sizes[0]}: they are of "
                "different saves"
            )
    for group, names in enumerate(shapes):
        offset = 0
        for name, shape in names.items():
            size = torch.Size(shape)
            part = -(-size.numel() // len(files))
            numels = [max(0, min(part, size.numel() - rank * part)) for rank in range(len(files))]
            places = (Place(rank, group, offset, numel) for rank, numel in enumerate(numels) if numel)
            located[name] = Located(size, group, tuple(places))
            offset += part
        if offset != sizes[0][group]:
            raise CheckpointError(
                f"'{files[0].path}' has {sizes[0][group]} elements of group {group}, but the parameters in "
                f"'{folder.model[0].name}' have {offset} there: they are of different saves, or the weights are on NVMe"
            )
    return located


def source_of(name: str, located: Located, files: Sequence[OptimizerFile], key: str) -> Source:
    """The weights of a parameter, or its state of that key.

    Raises:
        CheckpointError: a rank does not have it all.
    """
    pieces = []
    for place in located.places:
        stored = files[place.rank].column(place.group, key)
        if not isinstance(stored, Stored) or not stored.is_contiguous:
            raise CheckpointError(f"'{files[place.rank].path}' has no '{key}' for '{name}', other ranks have it")
        if place.start + place.numel > stored.shape.numel():
            raise CheckpointError(
                f"'{files[place.rank].path}' has {stored.shape.numel()} elements of '{key}', too few for '{name}'"
            )
        pieces.append(Piece(stored, place.start, place.numel))
    dtype = pieces[0].stored.dtype if pieces else torch.float32
    if any(piece.stored.dtype != dtype for piece in pieces):
        raise CheckpointError(f"'{name}' has several dtypes in '{files[0].path.parent}'")
    shape = located.shape
    return Source(f"{name}/{key}" if key else name, shape, dtype, tuple(pieces))

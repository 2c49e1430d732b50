"""The files of a DeepSpeed checkpoint: which folder, which ranks, what is missing.

[Note: names] In the folder of a tag, ``[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt`` has data-parallel rank D's
part of the optimizer. ``mp_rank_MM_model_states.pt`` has the module (ZeRO-1/2 or no ZeRO);
``zero_pp_rank_D_mp_rank_MM_model_states.pt`` has it in ZeRO-3, where parameters in it are empty.
``layer_L_expert_E_mp_rank_MM_model_states.pt`` has the model's own weights of one expert. A universal checkpoint has
a folder ``zero/NAME`` for each parameter. MM counts tensor- and pipeline-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ds_fragment.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_PARALLEL = (
    "is of another tensor- or pipeline-parallel rank than 0, and only checkpoints with one such rank can be "
    "consolidated: make a universal checkpoint of this one first (deepspeed.checkpoint.ds_to_universal)"
)
_PIPELINE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")


@dataclass
class Folder:
    """What a checkpoint's folder holds.

    Attributes:
        path: the folder of the tag.
        optimizer: the file of each data-parallel rank's optimizer state, none without ZeRO.
        model: the file with the module, of each rank in ZeRO-3.
        experts: the files of experts, by layer and number.
        zero: the folder of a universal checkpoint with a folder for each parameter.
        parallel: whether tensor- or pipeline-parallel ranks saved it.
    """

    path: Path
    optimizer: list[Path] = field(default_factory=list)
    model: list[Path] = field(default_factory=list)
    experts: dict[tuple[int, int], Path] = field(default_factory=dict)
    zero: Path | None = None
    parallel: bool = False

    @property
    def is_zero3(self) -> bool:
        """Whether each rank has a file with its part of the module."""
        return self.model[0].name.startswith("zero_pp_rank_")


def find_folder(checkpoint_dir: Path, tag: str | None) -> Path:
    """The folder of the tag; without one, of the tag that ``latest`` names, or the folder itself.

    Raises:
        CheckpointError: there is none.
    """
    if not checkpoint_dir.is_dir():
        raise CheckpointError(f"checkpoint_dir is '{checkpoint_dir}', which is not a folder")
    names = [tag] if tag is not None else []
    latest = checkpoint_dir / "latest"
    universal = checkpoint_dir / "latest_universal"
    if tag is None:
        if latest.is_file() or (universal.is_file() and not _is_checkpoint(checkpoint_dir)):
            source = latest if latest.is_file() else universal
            names = [source.read_text(encoding="utf-8", errors="replace").strip()]
            if not names[0]:
                raise CheckpointError(f"'{source}' is empty: pass tag=..., one of {_tags(checkpoint_dir)}")
        elif _is_checkpoint(checkpoint_dir):
            return checkpoint_dir
        else:
            raise CheckpointError(f"'{checkpoint_dir}' has no file 'latest': {_looks_like(checkpoint_dir)}")
    folder = checkpoint_dir / names[0]
    if not folder.is_dir():
        told = f"tag is '{tag}'" if tag is not None else f"'{source}' names '{names[0]}'"
        raise CheckpointError(f"{told}, but '{folder}' is not a folder: there are {_tags(checkpoint_dir)}")
    return folder


def scan(path: Path) -> Folder:
    """What is in the folder of a tag.

    Raises:
        CheckpointError: it is no DeepSpeed checkpoint, a file of it is missing, or it is of a kind that cannot be read.
    """
    found = Folder(path, zero=path / "zero" if (path / "zero").is_dir() else None)
    optimizer: dict[int, Path] = {}
    model: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        expert = _EXPERT.fullmatch(file.name)
        matched = _OPTIMIZER.fullmatch(file.name) or _MODEL.fullmatch(file.name) or expert
        if (matched and int(matched[matched.re.groups])) or _PIPELINE.fullmatch(file.name):
            found.parallel = True
            if found.zero is None:
                raise CheckpointError(f"'{file}' {_PARALLEL}")
        elif expert:
            found.experts[int(expert[1]), int(expert[2])] = file
        elif matched:
            files = optimizer if matched.re is _OPTIMIZER else model
            _put(files, int(matched[1] or 0), file)
    if not model and not optimizer and found.zero is None:
        raise CheckpointError(f"'{path}' has no *_model_states.pt: {_looks_like(path)}")
    if not model:
        raise CheckpointError(f"'{path / 'mp_rank_00_model_states.pt'}' is missing")
    found.optimizer, found.model = _ordered(path, optimizer), _ordered(path, model)
    return found


def _put(files: dict[int, Path], rank: int, file: Path) -> None:
    if rank in files:
        raise CheckpointError(
            f"'{files[rank].name}' and '{file.name}' in '{file.parent}' are of the same rank: they are of two saves"
        )
    files[rank] = file


def _ordered(path: Path, files: Mapping[int, Path]) -> list[Path]:
    for rank in range(max(files, default=-1) + 1):
        if rank not in files:
            kind = re.sub(r"(?<=pp_rank_)\d+", str(rank), next(iter(files.values())).name)
            raise CheckpointError(f"'{path / kind}' is missing: there are the files of ranks {sorted(files)}")
    return [files[rank] for rank in sorted(files)]


def _is_checkpoint(path: Path) -> bool:
    return (path / "zero").is_dir() or any(_MODEL.fullmatch(file.name) for file in path.iterdir())


def _tags(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.is_dir())


def _looks_like(path: Path) -> str:
    names = sorted(file.name for file in path.iterdir())
    if tags := [file.name for file in path.iterdir() if file.is_dir() and _is_checkpoint(file)]:
        return f"pass tag=..., one of {sorted(tags)}"
    if any(name.endswith(".safetensors") for name in names):
        return "it looks like a model in safetensors files, which is consolidated already"
    if any(name.endswith(".distcp") for name in names):
        return "it looks like a checkpoint of torch.distributed.checkpoint, not of DeepSpeed"
    if any(name.startswith("pytorch_model") for name in names):
        return "it looks like a state dict of torch.save, not a checkpoint of DeepSpeed"
    if any(name.endswith("_optim_states.pt") for name in names):
        return "it has optimizer states only, so that it is not complete"
    return f"it does not look like a checkpoint of DeepSpeed; it holds {names[:5] or 'nothing'}"

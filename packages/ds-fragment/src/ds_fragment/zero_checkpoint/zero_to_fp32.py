"""The functions of ``deepspeed.utils.zero_to_fp32``, over `consolidate` and what it is made of.

They need no DeepSpeed, import nothing that a checkpoint names, and read one tensor at a time where they write files.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_fragment.checkpoint.writer import Entry, Writer
from ds_fragment.errors import CheckpointError, InvalidValueError
from ds_fragment.zero_checkpoint.arguments import bytes_of, dtype_of
from ds_fragment.zero_checkpoint.consolidate import consolidate
from ds_fragment.zero_checkpoint.contents import read_contents
from ds_fragment.zero_checkpoint.folder import find_folder, scan
from ds_fragment.zero_checkpoint.read import Reader
from ds_fragment.zero_checkpoint.sources import Source

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "get_checkpoint_files",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "to_torch_tensor",
]

_log = logging.getLogger("ds.fragment")


class LazyTensor:
    """A tensor of a checkpoint that is read at each call of `contiguous`."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source = source
        self.shape, self.dtype = source.shape, dtype

    def contiguous(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        with Reader() as reader:
            return reader.read(self._source).contiguous().to(self.dtype)


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The whole state dict of a ZeRO checkpoint: buffers and trained parameters in fp32, frozen ones as they are.

    Args:
        checkpoint_dir: the folder with the file ``latest``, or the folder of a tag itself.
        tag: the checkpoint's folder in ``checkpoint_dir``; the one that ``latest`` names where it is None.
        exclude_frozen_parameters: whether to leave out parameters that were not trained.
        lazy_mode: whether to return objects with a method ``contiguous`` that reads the tensor.

    Raises:
        CheckpointError: a file is missing, damaged, half written or of another save; or a parameter has no values.
    """
    folder = scan(find_folder(Path(checkpoint_dir), None if tag is None else str(tag)))
    contents = read_contents(folder, exclude_frozen=exclude_frozen_parameters)
    found: dict[str, Any] = {}
    for name, source in contents.buffers.items():
        found[name] = LazyTensor(source, torch.float32 if source.dtype.is_floating_point else source.dtype)
    for name, source in (contents.frozen | contents.trained).items():
        found[name] = LazyTensor(source, source.dtype)
    found |= {alias: found[name] for alias, name in contents.tied.items()}
    return found if lazy_mode else to_torch_tensor(found)


def to_torch_tensor(
    state_dict: Mapping[str, Any], return_empty_tensor: bool = False, dtype: torch.dtype | str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a lazy state dict, second names with the same tensor.

    Args:
        state_dict: what `get_fp32_state_dict_from_zero_checkpoint` returned.
        return_empty_tensor: whether to return tensors of the same shapes with anything in them.
        dtype: of floating-point tensors; None leaves each its own.
    """
    wanted = None if dtype is None else dtype_of(dtype)
    made: dict[int, torch.Tensor] = {}
    found = {}
    for name, lazy in state_dict.items():
        if id(lazy) not in made:
            target = wanted if wanted and lazy.dtype.is_floating_point else lazy.dtype
            tensor = torch.empty(lazy.shape, dtype=target) if return_empty_tensor else lazy.contiguous().to(target)
            made[id(lazy)] = tensor
        found[name] = made[id(lazy)]
    return found


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the state dict of a ZeRO checkpoint to files, see `ds_fragment.zero_checkpoint.consolidate`.

    Args:
        checkpoint_dir: the folder with the file ``latest``, or the folder of a tag itself.
        output_dir: a folder, which is made where there is none.
        dtype: of floating-point parameters and buffers.
        max_shard_size: the largest file, as ``"5GB"``; None for one file.
        safe_serialization: ``model.safetensors``, where tied parameters are stored once, or ``pytorch_model.bin``.
        tag: the checkpoint's folder in ``checkpoint_dir``; the one that ``latest`` names where it is None.
        exclude_frozen_parameters: whether to leave out parameters that were not trained.

    Raises:
        CheckpointError: a file is missing, damaged, half written or of another save; or a parameter has no values.
        InvalidValueError: an argument cannot be used.
    """
    wanted, largest = dtype_of(dtype), bytes_of(max_shard_size)
    if safe_serialization:
        consolidate(
            checkpoint_dir,
            _folder(output_dir),
            tag=None if tag is None else str(tag),
            exclude_frozen_parameters=exclude_frozen_parameters,
            dtype=wanted,
            max_shard_bytes=largest,
        )
        return
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters, lazy_mode=True)
    _save_pickled(state, _folder(output_dir), wanted, largest)


def _save_pickled(state: Mapping[str, Any], folder: Path, dtype: torch.dtype, largest: int) -> None:
    first = {id(lazy): name for name, lazy in reversed(list(state.items()))}
    own = [name for name, lazy in state.items() if first[id(lazy)] == name]
    floating = [state[name].dtype.is_floating_point for name in own]
    entries = [
        Entry(name, dtype if casts else state[name].dtype, state[name].shape)
        for name, casts in zip(own, floating, strict=True)
    ]
    shards = Writer(folder / "cut.safetensors", entries, {}, largest, token="").shards
    places: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, span in enumerate(shards, 1):
        file = "pytorch_model.bin" if len(shards) == 1 else f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        names = {own[position] for position in span}
        part = {name: lazy for name, lazy in state.items() if first[id(lazy)] in names}
        places |= dict.fromkeys(part, file)
        temporary = folder / f".{file}.tmp"
        torch.save(to_torch_tensor(part, dtype=dtype), temporary)
        os.replace(temporary, folder / file)
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """`convert_zero_checkpoint_to_state_dict` with fp32 parameters and buffers."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Move a model to the CPU and load a ZeRO checkpoint into it; names that only one of them has are logged.

    Raises:
        CheckpointError: a file is missing, damaged, half written or of another save; or a parameter has no values.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    result = model.load_state_dict(state, strict=False)
    for kind, names in (("only the model has", result.missing_keys), ("only it has", result.unexpected_keys)):
        if names:
            _log.warning("loading '%s': %s %s", checkpoint_dir, kind, ", ".join(names))
    return model


def get_checkpoint_files(checkpoint_dir: str | os.PathLike[str], glob_pattern: str) -> list[str]:
    """The files of a tag's folder of that pattern, in the order of their numbers.

    Raises:
        CheckpointError: there are none.
    """
    found = glob.glob(glob_pattern, root_dir=checkpoint_dir)
    if not found:
        raise CheckpointError(f"'{checkpoint_dir}' has no {glob_pattern}")
    found.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    return [os.path.join(checkpoint_dir, name) for name in found]


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """The files of a tag's folder with optimizer state."""
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """The files of a tag's folder with the module."""
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> str:
    """The file of a tag's folder with rank 0's module.

    Raises:
        CheckpointError: there is none.
    """
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if int(zero_stage) == 3 else "mp_rank_00_model_states.pt"
    path = os.path.join(checkpoint_dir, name)
    if not os.path.exists(path):
        raise CheckpointError(f"'{path}' is missing")
    return path


def _folder(output_dir: str | os.PathLike[str]) -> Path:
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise InvalidValueError(f"output_dir is '{folder}', which is a file: name a folder")
    return folder

"""One model in safetensors files from the folder of a DeepSpeed checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_fragment.checkpoint import files
from ds_fragment.checkpoint.writer import MAX_SHARD_BYTES, Entry, optimizer_target
from ds_fragment.errors import CheckpointError, InvalidValueError
from ds_fragment.zero_checkpoint import workers
from ds_fragment.zero_checkpoint.contents import read_contents
from ds_fragment.zero_checkpoint.folder import find_folder, scan
from ds_fragment.zero_checkpoint.read import Reader
from ds_fragment.zero_checkpoint.sources import Contents, Source
from ds_fragment.zero_checkpoint.unpickle import number

_PROCESSES = 4  # at most, unless the caller says more: they share the disk
_PER_PROCESS = 1 << 30  # bytes for which it is worth it to start a process


@dataclass(frozen=True)
class Summary:
    """What `consolidate` wrote.

    Attributes:
        path: the safetensors file, or the index of several.
        parameters: how many parameters and buffers, tied ones once.
        nbytes: of all tensors, those of the optimizer state included.
        files: how many safetensors files.
    """

    path: Path
    parameters: int
    nbytes: int
    files: int


def consolidate(
    checkpoint_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tag: str | None = None,
    optimizer: bool = False,
    exclude_frozen_parameters: bool = False,
    dtype: torch.dtype | None = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    processes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | bool = False,
) -> Summary:
    """Write the fp32 weights of a DeepSpeed checkpoint to safetensors files, without DeepSpeed, a GPU or the ranks.

    It reads checkpoints of ZeRO-1, 2 and 3, of DeepSpeed's BF16 optimizer, universal ones, and the model's weights of
    checkpoints without ZeRO. One process calls it. Each process that writes has one tensor in memory at a time. The
    files are written under temporary names and renamed when they are complete. Nothing that a file names is imported or
    called. A parameter with several names is stored once; the metadata entry ``tied`` says which (JSON, alias to name).

    Args:
        checkpoint_dir: the folder with the file ``latest``, or the folder of a tag itself.
        output: ``model.safetensors``, say, in a folder that exists, or a folder, which is made where there is none.
            Above ``max_shard_bytes`` there are several files, and ``model.safetensors.index.json`` says what is where.
        tag: the checkpoint's folder in ``checkpoint_dir``; the one that ``latest`` names where it is None.
        optimizer: whether to write the optimizer state to a file beside it, as ``PARAMETER/KEY``.
        exclude_frozen_parameters: whether to leave out parameters that were not trained.
        dtype: of floating-point parameters and buffers, None for the one that each has in the checkpoint.
            Optimizer state keeps its own.
        max_shard_bytes: the largest file.
        processes: how many write, each its own files; None for one for each GiB, up to 4 and to the number of cores
            and files.
        metadata: strings for the header.
        progress: True for a bar (or, without rich, log lines), or a function that is called with bytes written and
            bytes in all.

    Returns:
        What was written.

    Raises:
        CheckpointError: a file is missing, damaged, half written or of another save; or a parameter has no values; it
            is named. Nothing is left in ``output``.
        InvalidValueError: an argument cannot be used.
    """
    files.require_metadata(metadata or {})
    target = _target(Path(output), max_shard_bytes, processes)
    contents = read_contents(
        scan(find_folder(Path(checkpoint_dir), tag)), optimizer=optimizer, exclude_frozen=exclude_frozen_parameters
    )
    if optimizer and not contents.state:
        raise CheckpointError(f"'{checkpoint_dir}' has no optimizer state: leave optimizer=True out")
    token = secrets.token_hex(4)
    header = {**(metadata or {}), **({"tied": json.dumps(contents.tied)} if contents.tied else {})}
    job = workers.Job(
        model=workers.Part(target, list(_weights(contents)), _entries(_weights(contents), dtype), header),
        optimizer=_optimizer_part(contents, optimizer_target(target, token)) if optimizer else None,
        max_shard_bytes=max_shard_bytes,
        token=token,
    )
    writer = job.writer()
    shards = len(writer.shards) + (len(writer.beside.shards) if writer.beside else 0)
    total = writer.total + (writer.beside.total if writer.beside else 0)
    useful = min(os.cpu_count() or 1, _PROCESSES, -(-total // _PER_PROCESS))
    count = max(1, min(processes or useful, shards))
    with contextlib.ExitStack() as stack:
        stack.callback(writer.abandon)
        report = stack.enter_context(files.reporter(progress, target.name))
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
        writer.begin()
        if count > 1:
            workers.run(job, writer, count, lambda done: report(done, total))
        else:
            job.write(writer, range(shards), lambda done: report(done, total))
        writer.commit()
    several = len(writer.shards) > 1
    return Summary(files.index_path(target) if several else target, len(job.model.entries), total, shards)


def iter_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str], *, tag: str | None = None, exclude_frozen_parameters: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and values of a DeepSpeed checkpoint's buffers and parameters, one after the other.

    Trained parameters are fp32; the others, and buffers, have the dtype that they have in the checkpoint. The second
    name of a tied parameter comes right after the first, with the same tensor. See `consolidate` for what can be read.

    Args:
        checkpoint_dir: the folder with the file ``latest``, or the folder of a tag itself.
        tag: the checkpoint's folder in ``checkpoint_dir``; the one that ``latest`` names where it is None.
        exclude_frozen_parameters: whether to leave out parameters that were not trained.

    Yields:
        Name and tensor, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, half written or of another save; or a parameter has no values.
    """
    folder = scan(find_folder(Path(checkpoint_dir), tag))
    contents = read_contents(folder, exclude_frozen=exclude_frozen_parameters)
    second: dict[str, list[str]] = {}
    for alias, name in contents.tied.items():
        second.setdefault(name, []).append(alias)
    with Reader() as reader:
        for source in _weights(contents):
            tensor = reader.read(source)
            for name in (source.name, *second.get(source.name, ())):
                yield name, tensor


def _target(output: Path, max_shard_bytes: int, processes: int | None) -> Path:
    for name, value in (("max_shard_bytes", max_shard_bytes), ("processes", processes)):
        if value is not None and value <= 0:
            raise InvalidValueError(f"{name} is {value}, expected a positive number")
    if output.suffix != ".safetensors":
        if output.exists() and not output.is_dir():
            raise InvalidValueError(f"output is '{output}', which is a file: name a folder, or NAME.safetensors")
        return output / "model.safetensors"
    if not output.parent.is_dir():
        raise InvalidValueError(f"output is '{output}', but its folder does not exist: make it first")
    if output.is_dir():
        raise InvalidValueError(f"output is '{output}', which is a folder: name the file")
    return output


def _weights(contents: Contents) -> Iterator[Source]:
    for sources in (contents.buffers, contents.frozen, contents.trained):
        yield from sources.values()


def _entries(sources: Iterator[Source] | Sequence[Source], dtype: torch.dtype | None) -> list[Entry]:
    return [
        Entry(source.name, dtype if dtype and source.dtype.is_floating_point else source.dtype, source.shape)
        for source in sources
    ]


def _optimizer_part(contents: Contents, target: Path) -> workers.Part:
    entries = _entries(contents.state, None)
    entries += [Entry(name, torch.float32, torch.Size([])) for name in contents.scalars]
    scalars = [number(value) for value in contents.scalars.values()]
    return workers.Part(
        target, [*contents.state, *scalars], entries, {"param_groups": json.dumps(contents.param_groups)}
    )

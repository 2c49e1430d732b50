"""``ds-fragment consolidate CHECKPOINT OUT``."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ds_fragment.zero_checkpoint.arguments import DTYPES, bytes_of
from ds_fragment.zero_checkpoint.consolidate import consolidate

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_consolidate(subparsers: SubParsers) -> None:
    """Add the command to those of a parser."""
    parser = subparsers.add_parser(
        "consolidate",
        help="DeepSpeed's ZeRO-1/2/3 and universal checkpoints to safetensors",
        description="Write the fp32 weights of a DeepSpeed checkpoint to safetensors files.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder with the file 'latest', or that of a tag")
    parser.add_argument("out", metavar="OUT", help="NAME.safetensors, or a folder for model.safetensors")
    parser.add_argument("--tag", help="the checkpoint's folder in CHECKPOINT (default: what 'latest' names)")
    parser.add_argument("--optimizer", action="store_true", help="write the optimizer state to a file beside it")
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, "stored"],
        default="float32",
        help="'stored' is what each has (default: float32)",
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--processes", type=int, metavar="N", help="how many write (default: up to 4)")
    parser.add_argument("--exclude-frozen", action="store_true", help="leave out parameters that were not trained")
    parser.add_argument("--quiet", action="store_true", help="neither a progress bar nor a summary")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Do what was asked for, and return the exit status."""
    begin = time.perf_counter()
    summary = consolidate(
        given.checkpoint,
        given.out,
        tag=given.tag,
        optimizer=given.optimizer,
        exclude_frozen_parameters=given.exclude_frozen,
        dtype=DTYPES.get(given.dtype),
        max_shard_bytes=bytes_of(given.max_shard_size),
        processes=given.processes,
        progress=not given.quiet,
    )
    if not given.quiet:
        seconds = time.perf_counter() - begin
        many = f"{summary.files} files" if summary.files > 1 else "1 file"
        print(f"{summary.path}: {summary.parameters} tensors, {summary.nbytes:,} bytes in {many}, {seconds:.1f} s")
    return 0

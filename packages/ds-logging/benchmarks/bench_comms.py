"""What recording small all-reduces costs: by a `CommsLogger`, by DeepSpeed's log and by torch's profiler.

    python packages/ds-logging/benchmarks/bench_comms.py [--quick] [--json PATH]

Two ranks over gloo, and where there is a GPU one rank over NCCL, issue all-reduces of 8 floats. Blocks with and without
a log take turns in one process; every block of a log begins with `start` and ends with `stop`, whose time stands
apart. Medians over the blocks, in microseconds an operation. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

Way = tuple[Callable[[], AbstractContextManager[Any]], Callable[[], object]]
"""What surrounds a block, and one operation."""


def ways_on_gloo() -> dict[str, Way]:
    """By name; the log's own pair stands first."""
    import torch
    import torch.distributed as dist
    from ds_logging import CommsLogger

    tensor = torch.ones(8)

    def all_reduce() -> object:
        return dist.all_reduce(tensor)

    def profiled() -> AbstractContextManager[Any]:
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    found: dict[str, Way] = {
        "no log": (contextlib.nullcontext, all_reduce),
        "ds_logging.CommsLogger": (CommsLogger, all_reduce),
        "torch.profiler": (profiled, all_reduce),
    }
    with contextlib.suppress(ImportError):
        import deepspeed
        import deepspeed.comm as theirs

        deepspeed.init_distributed("gloo", verbose=False)

        @contextlib.contextmanager
        def logged() -> Iterator[None]:
            theirs.configure(enabled=True, prof_all=True)
            yield
            theirs.configure(enabled=False)
            theirs.comm.comms_logger.comms_dict = {}

        found["deepspeed.comm, no log"] = (contextlib.nullcontext, lambda: theirs.all_reduce(tensor))
        found["deepspeed.comm, its log"] = (logged, lambda: theirs.all_reduce(tensor))
    return found


def ways_on_nccl() -> dict[str, Way]:
    """Issuing only: the host does not wait for the device."""
    import torch
    import torch.distributed as dist
    from ds_logging import CommsLogger

    tensor = torch.ones(8, device="cuda")

    def all_reduce() -> object:
        return dist.all_reduce(tensor, async_op=True)

    return {
        "no log": (contextlib.nullcontext, all_reduce),
        "ds_logging.CommsLogger(timing=False)": (lambda: CommsLogger(timing=False), all_reduce),
        # Last: a group that once measured operations goes on doing so.
        "ds_logging.CommsLogger": (CommsLogger, all_reduce),
    }


def measure(ways: dict[str, Way], operations: int, blocks: int, synchronize: Callable[[], object]) -> dict[str, Any]:
    """Return, for each way, microseconds an operation, and microseconds an operation that its end took besides."""
    inside: dict[str, list[float]] = {name: [] for name in ways}
    end: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks + 1):  # the first one warms up
        for name, (surround, operation) in ways.items():
            synchronize()
            with contextlib.ExitStack() as stack:
                stack.enter_context(surround())
                began = time.perf_counter()
                for _ in range(operations):
                    operation()
                ended = time.perf_counter()
                synchronize()
                left = time.perf_counter()
            if block:
                inside[name].append((ended - began) / operations * 1e6)
                end[name].append((time.perf_counter() - left) / operations * 1e6)
    return {
        name: {"microseconds": statistics.median(inside[name]), "at_the_end": statistics.median(end[name])}
        for name in ways
    }


def work(rank: int, size: int, backend: str, path: str, operations: int, blocks: int, sender: Any) -> None:
    """One rank."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(backend, store=dist.FileStore(path, size), rank=rank, world_size=size)
    if backend == "nccl":
        torch.cuda.set_device(0)
        found = measure(ways_on_nccl(), operations, blocks, torch.cuda.synchronize)
    else:
        found = measure(ways_on_gloo(), operations, blocks, dist.barrier)
    sender.send(found)
    dist.destroy_process_group()


def run(backend: str, size: int, operations: int, blocks: int) -> dict[str, Any]:
    """What rank 0 measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(
                target=work, args=(rank, size, backend, f"{folder}/store", operations, blocks, pipes[rank][1])
            )
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        if not pipes[0][0].poll(500):
            raise TimeoutError(f"{backend}: no answer in 500 s")
        found: dict[str, Any] = pipes[0][0].recv()
        for rank in ranks:
            rank.join(30)
            rank.kill()
    return found


def memory(names: int) -> float:
    """Return MiB that a log with so many record names holds."""
    from ds_logging import CommsLogger

    tracemalloc.start()
    log = CommsLogger()
    for number in range(names):
        log.append("all_reduce", f"layer {number}", 1.0, 8, group_size=2)
    log.has_data()
    held = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    return held


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the operations")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    arguments = parser.parse_args()
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    share = 10 if arguments.quick else 1
    machine = f"{os.cpu_count()} CPU cores"
    found: dict[str, Any] = {"gloo, 2 ranks": run("gloo", 2, 1000 // share, 10)}
    if torch.cuda.is_available():
        machine = f"1x {torch.cuda.get_device_name()}"
        os.environ.pop("DS_ACCELERATOR")
        found["nccl, 1 rank"] = run("nccl", 1, 10_000 // share, 5)
    held = memory(100_000 // share)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "command": " ".join(["python", *(arg for arg in sys.argv if arg not in ("--json", str(arguments.json)))]),
        "commit": commit.stdout.strip(),
        "machine": machine,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
    for backend, ways in found.items():
        print(f"\n{backend}: microseconds an all-reduce of 8 floats")
        for name, figures in ways.items():
            base = ways["deepspeed.comm, no log" if name.startswith("deepspeed") else "no log"]["microseconds"]
            extra = figures["microseconds"] - base
            print(
                f"  {name:40s} {figures['microseconds']:8.1f}  {extra:+7.2f} ({extra / base:+.1%}), "
                f"at the end {figures['at_the_end']:.2f}"
            )
    print(f"\na log of 100,000 record names holds {held:.1f} MiB" if share == 1 else "")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"about": about, "microseconds": found, "names_mib": held}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

"""GPU memory and time that NCCL communicators take, beside the estimate of `python -m ds_groups`. Needs two GPUs.

torchrun --nproc-per-node 2 packages/ds-groups/benchmarks/measure_nccl_memory.py
"""

from __future__ import annotations

import json
import os
import statistics
import time

import torch
import torch.distributed as dist
from ds_groups import GroupOptions, ParallelTopology
from ds_groups._rehearse.nccl_memory import nccl_memory


def used() -> int:
    """Bytes of this GPU in use, by whoever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    """Measure and print JSON on rank 0."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    world = dist.get_world_size()
    x = torch.ones(1 << 20, device="cuda")
    y = torch.empty_like(x)
    before = used()
    dist.all_reduce(x)
    first = used() - before
    rings, pairs, create, warm = [], [], [], []
    for turn in range(4):
        plan = ParallelTopology(world, tp=world)
        # Another time-out is another communicator: equal ones would be shared.
        bound = plan.bind(axes={"tp": GroupOptions(timeout=100 + turn)})
        begun = time.perf_counter()
        group = bound.group("tp")
        create.append((time.perf_counter() - begun) * 1e3)
        before = used()
        begun = time.perf_counter()
        dist.all_reduce(x, group=group)
        rings.append(used() - before)
        warm.append((time.perf_counter() - begun) * 1e3)
        before = used()
        dist.all_to_all_single(y, x, group=group)
        pairs.append(used() - before)
    report = {
        "command": "torchrun --nproc-per-node 2 packages/ds-groups/benchmarks/measure_nccl_memory.py",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "ranks": world,
        "first communicator, MiB": first >> 20,
        "another, after an all-reduce, MiB": [value >> 20 for value in rings],
        "more after an all-to-all, MiB": [value >> 20 for value in pairs],
        "estimate after an all-reduce, MiB": nccl_memory(world, world, "ring") >> 20,
        "estimate after an all-to-all, MiB": nccl_memory(world, world, "all-to-all") >> 20,
        "making the group, ms": statistics.median(create),
        "first all-reduce, ms": statistics.median(warm),
    }
    if rank == 0:
        print(json.dumps(report, indent=1))
        if os.environ.get("OUT"):
            with open(os.path.join(os.environ["OUT"], "nccl_memory.json"), "w") as file:
                file.write(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

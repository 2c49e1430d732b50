"""What a log line costs, hidden and shown, beside the standard library and other packages.

    python packages/ds-logging/benchmarks/bench_log_cost.py [--quick] [--json PATH]

On rank 1 of 2 gloo ranks for hidden lines, on one process for shown ones. In one run, interleaved; medians. Peers that
are not installed are left out and named.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="1", GLOO_SOCKET_IFNAME="lo")

import argparse
import contextlib
import json
import logging
import multiprocessing
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

Calls = dict[str, Callable[[], object]]
PEERS = ("deepspeed", "accelerate", "lightning", "loguru")


def interleaved(calls: Calls, count: int, rounds: int) -> dict[str, float]:
    """Nanoseconds of one call, the calls in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter_ns()
            for _ in range(count):
                call()
            if turn:
                samples[name].append((time.perf_counter_ns() - begun) / count)
    return {name: statistics.median(values) for name, values in samples.items()}


def own_calls() -> Calls:
    """Our calls, and the standard library's."""
    from ds_logging import log_dist, log_dist_once, logger, warning_once

    theirs = logging.getLogger("standard")
    theirs.setLevel(logging.WARNING)
    first = [0]
    return {
        "an empty function": lambda: None,
        "standard library, level off": lambda: theirs.info("x"),
        "log_dist(m)": lambda: log_dist("x"),
        "log_dist(m, ranks=[0])": lambda: log_dist("x", ranks=first),
        "log_dist(m, level='info')": lambda: log_dist("x", level="info"),
        "log_dist_once(m)": lambda: log_dist_once("x"),
        "logger.info(m)": lambda: logger.info("x"),
        "warning_once(m), said before": lambda: warning_once("x"),
    }


def peer_calls(rank: int) -> Calls:
    """What peers do on a rank that does not log."""
    calls: Calls = {}
    with contextlib.suppress(ImportError):
        import deepspeed
        from deepspeed.utils import log_dist as deepspeed_log_dist

        deepspeed.init_distributed("gloo")
        calls["DeepSpeed's log_dist(m, ranks=[0])"] = lambda: deepspeed_log_dist("x", ranks=[0])
    with contextlib.suppress(ImportError):
        from accelerate import PartialState
        from accelerate.logging import get_logger

        PartialState(cpu=True)
        accelerate_logger = get_logger("accelerate_bench", "INFO")
        calls["Accelerate's get_logger().info(m)"] = lambda: accelerate_logger.info("x")
    with contextlib.suppress(ImportError):
        from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

        rank_zero_only.rank = rank
        calls["Lightning's rank_zero_info(m)"] = lambda: rank_zero_info("x")
    with contextlib.suppress(ImportError):
        from loguru import logger as loguru_logger

        loguru_logger.remove()
        loguru_logger.add(sys.stderr, level="WARNING")
        calls["loguru's info(m), level off"] = lambda: loguru_logger.info("x")
    return calls


def hidden(rank: int, store: str, count: int, rounds: int, answers: Any) -> None:
    """Measure hidden lines on rank 1."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29871")
    from ds_logging import configure

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    with open(os.devnull, "w") as nowhere:
        configure("info", stream=nowhere)
        calls = {**own_calls(), **peer_calls(rank)}
        if rank == 1:
            answers.put(interleaved(calls, count, rounds))
        dist.barrier()
    dist.destroy_process_group()


def shown(count: int, rounds: int) -> dict[str, float]:
    """Measure shown lines, in the same format, to a file."""
    from ds_logging import configure, log_dist, logger

    form = "[%(asctime)s] %(levelname)s %(filename)s:%(lineno)d:%(funcName)s %(message)s"
    root = logging.getLogger("standard_shown")
    root.propagate = False
    root.setLevel(logging.INFO)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(f"{folder}/theirs", "w") as theirs,
        open(f"{folder}/ours", "w") as ours,
    ):
        handler = logging.StreamHandler(theirs)
        handler.setFormatter(logging.Formatter(form))
        root.addHandler(handler)
        configure("info", stream=ours, format=form)
        return interleaved(
            {
                "standard library's StreamHandler": lambda: root.info("step %d", 3),
                "logger.info": lambda: logger.info("step %d", 3),
                "log_dist": lambda: log_dist("step %d", 3),
            },
            count,
            rounds,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    count, rounds = (200, 3) if options.quick else (4000, 25)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            context.Process(target=hidden, args=(rank, f"{folder}/store", count, rounds, answers)) for rank in range(2)
        ]
        for job in jobs:
            job.start()
        results = {"hidden": answers.get(timeout=300)}
        for job in jobs:
            job.join(60)
    results["shown"] = shown(count // 4, rounds)
    for title, measured in results.items():
        print(f"{title} line, nanoseconds (Python {platform.python_version()}, {platform.machine()})")
        for name, value in measured.items():
            print(f"  {name:40s} {value:9.0f}")
    named = " ".join(results["hidden"])
    left_out = [name for name in PEERS if name not in named.lower()]
    print(f"not installed: {', '.join(left_out) or 'none'}")
    if options.json:
        options.json.write_text(json.dumps({"python": platform.python_version(), "nanoseconds": results}, indent=1))


if __name__ == "__main__":
    main()

"""What ``RepeatingLoader`` costs, beside a bare loop, DeepSpeed's and what Accelerate and torchdata do.

    python packages/ds-loader/benchmarks/bench_loader.py [--quick] [--json PATH]

In one run, interleaved; medians. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import argparse
import gc
import importlib.util
import json
import pathlib
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ds_loader import RepeatingLoader
from torch.utils.data import DataLoader, DistributedSampler

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def repeat(loader: Any) -> Iterator[Any]:
    """What many write by hand; like DeepSpeed's, it tells nobody which epoch it is."""
    while True:
        yield from loader


def theirs(loader: Any) -> Iterator[Any]:
    """DeepSpeed's RepeatingLoader."""
    from deepspeed.utils import RepeatingLoader as DeepSpeeds

    return DeepSpeeds(loader)  # type: ignore[no-any-return]


def per_batch(make: Callable[[], Any], count: int, rounds: int) -> dict[str, float]:
    """Nanoseconds of one ``next``, the ways in turn."""
    ways: dict[str, Callable[[Any], Any]] = {"a generator by hand": repeat, "RepeatingLoader": RepeatingLoader}
    if importlib.util.find_spec("deepspeed"):
        ways["DeepSpeed's RepeatingLoader"] = theirs
    streams = {name: way(make()) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, stream in streams.items():
            begun = time.perf_counter_ns()
            for _ in range(count):
                next(stream)
            if turn:
                samples[name].append((time.perf_counter_ns() - begun) / count)
    return {name: statistics.median(values) for name, values in samples.items()}


SAMPLES, BATCH = 4_000_000, 8


def plain() -> Any:
    """A shuffled loader of 500,000 batches."""
    return DataLoader(range(SAMPLES), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


def distributed() -> Any:
    """The share of one of two ranks, of twice as many."""
    sampler = DistributedSampler(range(2 * SAMPLES), 2, 0, seed=1)
    return DataLoader(range(2 * SAMPLES), BATCH, sampler=sampler)


def resume_ours(make: Callable[[], Any], stop: int) -> Callable[[], Any]:
    """Load a state and take the next batch."""
    loader = RepeatingLoader(make())
    loader.skip(stop)
    next(loader)
    state = loader.state_dict()

    def way() -> Any:
        again = RepeatingLoader(make())
        again.load_state_dict(state)
        return next(again)

    return way


def resume_accelerate(make: Callable[[], Any], stop: int) -> Callable[[], Any]:
    """``accelerate.skip_first_batches``, and the next batch."""
    from accelerate import skip_first_batches

    return lambda: next(iter(skip_first_batches(make(), stop + 1)))


def resume_torchdata(stop: int) -> Callable[[], Any]:
    """``StatefulDataLoader`` by its own state, and the next batch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make() -> Any:
        return StatefulDataLoader(range(SAMPLES), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))

    loader = make()
    stream = iter(loader)
    for _ in range(stop + 1):
        next(stream)
    state = loader.state_dict()

    def way() -> Any:
        again = make()
        again.load_state_dict(state)
        return next(iter(again))

    return way


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each way, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()
            begun = time.perf_counter()
            way()
            if turn:
                samples[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


class Slow(torch.utils.data.Dataset[Any]):
    """A sample takes a quarter of a millisecond."""

    def __len__(self) -> int:
        """Two hundred batches of eight."""
        return 1600

    def __getitem__(self, index: int) -> int:
        time.sleep(0.00025)
        return index


def boundary(rounds: int) -> dict[str, float]:
    """Milliseconds that the first batch of an epoch is waited for, with two workers and a step of 3 ms."""
    makers: dict[str, Callable[[], Any]] = {
        "RepeatingLoader": lambda: RepeatingLoader(loader()),
        "RepeatingLoader, seamless=False": lambda: RepeatingLoader(loader(), seamless=False),
    }
    if importlib.util.find_spec("deepspeed"):
        makers["DeepSpeed's RepeatingLoader"] = lambda: theirs(loader())

    def loader() -> Any:
        return DataLoader(Slow(), 8, shuffle=True, num_workers=2)

    samples: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():
        stream = make()
        for step in range(200 * (rounds + 1)):
            begun = time.perf_counter()
            next(stream)
            taken = (time.perf_counter() - begun) * 1e3
            if step and step % 200 == 0:
                samples[name].append(taken)
            time.sleep(0.003)
        del stream
        gc.collect()
    return {name: statistics.median(values) for name, values in samples.items()}


def states() -> dict[str, float]:
    """Bytes of a state as JSON, and milliseconds to take one."""
    found = {}
    for name, loader in (("DistributedSampler", distributed()), ("shuffle=True with a generator", plain())):
        stream = RepeatingLoader(loader)
        next(stream)
        found[f"{name}, bytes"] = float(len(json.dumps(stream.state_dict())))
        found[f"{name}, ms"] = compare({"state": stream.state_dict}, 20)["state"]
    return found


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rounds = 3 if options.quick else 15
    stop = 4_000 if options.quick else 400_000
    rows: dict[str, dict[str, float]] = {
        "ns a batch, list of 1,000": per_batch(lambda: list(range(1000)), 50_000, rounds),
        "ns a batch, DataLoader, batches of 8": per_batch(lambda: DataLoader(range(8_000), 8), 2_000, rounds),
        "ms to the first batch of an epoch, 2 workers": boundary(2 if options.quick else 9),
        "a state": states(),
    }
    for title, make in (("shuffle=True", plain), ("DistributedSampler, shuffled", distributed)):
        ways = {"RepeatingLoader": resume_ours(make, stop)}
        if importlib.util.find_spec("accelerate"):
            ways["accelerate.skip_first_batches"] = resume_accelerate(make, stop)
        if make is plain and importlib.util.find_spec("torchdata"):
            ways["StatefulDataLoader's own state"] = resume_torchdata(stop)
        rows[f"ms to resume {stop:,} batches in, {title}"] = compare(ways, 2 if options.quick else 5)
    for title, row in rows.items():
        print(title)
        for name, value in row.items():
            print(f"    {name:40s}{value:12,.1f}")
    if options.json:
        about = {
            "command": " ".join(["python", "packages/ds-loader/benchmarks/bench_loader.py", *sys.argv[1:2]]).strip(),
            "machine": f"{os.cpu_count()} CPU cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A training step on a GPU with batches moved in four ways; and memory over 1,000 epochs.

    python packages/ds-loader/benchmarks/bench_to_device.py [--json PATH]

Batches of 64 images (38.5 MB, float32) come ready-made from host memory, so that the transfer is what differs. A step
is a product of matrices that takes about as long as it says. Ways are interleaved; medians of the time of one step.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ds_loader import RepeatingLoader
from torch.utils.data import DataLoader, Dataset

SHAPE = (64, 3, 224, 224)
DEVICE = torch.device("cuda")


class Ready(Dataset[Any]):
    """Batches that exist already."""

    def __init__(self, count: int) -> None:
        self.batches = [{"x": torch.randn(SHAPE), "y": torch.arange(64)} for _ in range(count)]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def by_hand(loader: Any, non_blocking: bool) -> Iterator[Any]:
    """What loops do themselves."""
    while True:
        for batch in loader:
            yield {name: value.to(DEVICE, non_blocking=non_blocking) for name, value in batch.items()}


def measure(data: Ready, size: int, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step, the ways in turn; the device works without waiting for the host."""
    weight = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)

    def plain(pin: bool) -> Any:
        return DataLoader(data, batch_size=None, pin_memory=pin)

    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "the step alone": lambda: by_hand([{"x": torch.randn(SHAPE, device=DEVICE)}], False),
        ".to(device)": lambda: by_hand(plain(False), False),
        "pin_memory, .to(device, non_blocking=True)": lambda: by_hand(plain(True), True),
        "RepeatingLoader(to_device=)": lambda: RepeatingLoader(plain(False), to_device=DEVICE),
        "RepeatingLoader(to_device=), pin_memory": lambda: RepeatingLoader(plain(True), to_device=DEVICE),
    }
    streams = {name: make() for name, make in makers.items()}
    samples: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds + 1):
        for name, stream in streams.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(steps):
                batch = next(stream)
                batch["x"].mul_(0.5)
                for _ in range(4):
                    weight @ weight
            torch.cuda.synchronize()
            if turn:
                samples[name].append((time.perf_counter() - begun) / steps * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def right(data: Ready) -> bool:
    """Whether the values are right while a slow consumer still works on the batches before."""
    loader = RepeatingLoader(DataLoader(data, batch_size=None), to_device=DEVICE)
    weight = torch.randn(4096, 4096, device=DEVICE)
    sums = []
    for _ in range(6 * len(data)):
        batch = next(loader)
        weight @ weight
        sums.append(batch["x"].double().sum())
        del batch
    wanted = [batch["x"].double().sum().item() for batch in data.batches] * 6
    return all(abs(found.item() - value) < 1e-6 * abs(value) + 1e-3 for found, value in zip(sums, wanted, strict=True))


def memory(epochs: int) -> dict[str, float]:
    """MiB on the device and in the host process after the 10th epoch and after the last."""
    data = [torch.randn(64, 1024) for _ in range(8)]
    loader = RepeatingLoader(DataLoader(data, batch_size=2), to_device=DEVICE)
    found = {}
    for epoch in range(epochs):
        for _ in range(len(loader)):
            next(loader).square().sum()
        if epoch in (9, epochs - 1):
            torch.cuda.synchronize()
            gc.collect()
            status = pathlib.Path("/proc/self/status").read_text().splitlines()
            resident = next(line for line in status if line.startswith("VmRSS")).split()[1]
            found[f"device, epoch {epoch + 1}"] = torch.cuda.memory_reserved() / 2**20
            found[f"host, epoch {epoch + 1}"] = int(resident) / 2**10
    return found


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rows = {"MiB over 1,000 epochs": memory(1000)}
    data = Ready(8)
    for size in (4096, 8192):
        rows[f"ms a step, four products of {size} x {size} in bf16"] = measure(data, size, 40, 7)
    rows["values right behind a slow consumer"] = {"yes": float(right(data))}
    for title, row in rows.items():
        print(title)
        for name, value in row.items():
            print(f"    {name:46s}{value:10.2f}")
    if options.json:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()[0]
        about = {
            "command": "python packages/ds-loader/benchmarks/bench_to_device.py",
            "machine": f"1x {torch.cuda.get_device_name()}, driver {driver}",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

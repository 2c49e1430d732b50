"""Measure the kernels on a CUDA device, beside what PyTorch offers, and write the figures and a chart.

    python benchmarks/bench_kernels.py --out docs/benchmarks/kernels.json
    python benchmarks/bench_kernels.py --chart docs/benchmarks/kernels.json    # from the figures, without a device

Times are what a caller waits for, wrapper included: the median over batches of calls one after the other, between two
device events. Every figure stands beside a device copy measured in the same run, counting bytes read and written.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ds_fragment import kernels
from ds_fragment.kernels import plan

SETS = ("large", "small", "odd", "smaller", "tiny")
TITLES = {
    "large": "the 146 tensors of Llama-3.2-1B",
    "small": "600 tensors of up to 1 Mi elements",
    "odd": "600 tensors of up to 1 Mi elements, odd sizes",
}
ABOUT = {
    "large": "the 146 tensors of Llama-3.2-1B, 1.24 G elements",
    "small": "600 tensors of 64 to 1,048,576 elements, sizes multiples of 64, 304 M elements",
    "odd": "600 tensors of 1 to 1,048,575 elements, odd sizes, so that the two sides are not aligned with each other",
    "smaller": "600 tensors of 64 to 524,288 elements, multiples of 64, 150 M elements",
    "tiny": "600 tensors of 64 to 131,072 elements, multiples of 64, 40 M elements",
}


def sizes(which: str) -> list[int]:
    if which == "large":
        layer = [2048 * 2048, 512 * 2048, 512 * 2048, 2048 * 2048, *[8192 * 2048] * 3, 2048, 2048]
        return [128256 * 2048, *layer * 16, 2048]
    rng = random.Random(which)
    if which == "odd":
        return [2 * rng.randrange(524288) + 1 for _ in range(600)]
    return [64 * rng.randrange(1, {"small": 16385, "smaller": 8193, "tiny": 2049}[which]) for _ in range(600)]


def seconds(call: Callable[[], Any], *, budget: float = 0.25) -> float:
    """Seconds a call takes when called over and over."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begin, 1e-5)
    batch = max(3, min(40, int(0.01 / once)))
    times = []
    for _ in range(max(7, min(25, int(budget / (batch * once))))):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(batch):
            call()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3 / batch)
    return statistics.median(times)


def host_seconds(call: Callable[[], Any]) -> float:
    """Seconds of the host's time that a call takes, without waiting for the device."""
    times = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_copy() -> float:
    """Bytes read and written in a second by a large device-to-device copy."""
    a, b = (torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * a.numel() / seconds(lambda: b.copy_(a))


class Bench:
    """Every way to do every operation on one set of tensors."""

    def __init__(self, which: str) -> None:
        self.which, self.numels = which, sizes(which)
        self.numel = sum(self.numels)
        self.hp = torch.randn(self.numel, device="cuda")
        self.views = list(self.hp.split_with_sizes(self.numels))
        self.lp = [torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in self.numels]

    def cases(self) -> dict[str, tuple[int, dict[str, Callable[[], Any]]]]:
        """For each operation, its bytes for each call and the ways to do it."""
        views, lp, n = self.views, self.lp, self.numel
        flat = torch.empty(n, dtype=torch.bfloat16, device="cuda")
        packed = list(flat.split_with_sizes(self.numels))
        found, inverse = torch.zeros(1, device="cuda"), torch.full((1,), 0.5, device="cuda")

        def loop(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> Callable[[], None]:
            def run() -> None:
                for dst, src in zip(dsts, srcs, strict=True):
                    dst.copy_(src)

            return run

        def sequence() -> None:
            torch._foreach_copy_(views, lp)
            torch._amp_foreach_non_finite_check_and_unscale_(views, found, inverse)
            torch._foreach_norm(views)

        cases: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
            "fp32 -> bf16": (
                6 * n,
                {
                    "kernel": lambda: kernels.copy(lp, views),
                    "foreach": lambda: torch._foreach_copy_(lp, views),
                    "loop": loop(lp, views),
                },
            ),
            "bf16 -> fp32": (
                6 * n,
                {
                    "kernel": lambda: kernels.copy(views, lp),
                    "foreach": lambda: torch._foreach_copy_(views, lp),
                    "loop": loop(views, lp),
                },
            ),
            "pack bf16": (
                4 * n,
                {
                    "kernel": lambda: kernels.copy(packed, lp),
                    "foreach": lambda: torch._foreach_copy_(packed, lp),
                    "loop": loop(packed, lp),
                },
            ),
            "gather_grads": (
                6 * n,
                {"kernel": lambda: kernels.gather_grads(views, lp, scale=inverse, found_inf=found), "torch": sequence},
            ),
            "gather_grads, accumulate": (
                10 * n,
                {"kernel": lambda: kernels.gather_grads(views, lp, scale=1e-3, accumulate=True, found_inf=found)},
            ),
            "norm bf16": (2 * n, {"kernel": lambda: kernels.norm(lp), "torch": lambda: torch._foreach_norm(lp)}),
            "norm fp32": (4 * n, {"kernel": lambda: kernels.norm(views), "torch": lambda: torch._foreach_norm(views)}),
            "publish, stochastic": (6 * n, {"kernel": lambda: kernels.publish(lp, views, seed=1)}),
        }
        return cases


def measure(which: str, only: tuple[str, ...] = ()) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, (size, ways) in Bench(which).cases().items():
        out[name] = {"bytes": size}
        for way, call in ways.items():
            if only and way not in only:
                continue
            took = seconds(call)
            out[name][way] = {"us": took * 1e6, "GB/s": size / took / 1e9, "host_us": host_seconds(call) * 1e6}
    torch.cuda.empty_cache()
    return out


def flat_rates() -> dict[str, float]:
    """Bytes a second of what torch does with one flat tensor of a gigaelement."""
    hp = torch.randn(1 << 30, device="cuda")
    lp = hp.bfloat16()
    ints = hp.view(torch.int32)
    return {
        "fp32 -> bf16": 6 * hp.numel() / seconds(lambda: lp.copy_(hp)),
        "bf16 -> fp32": 6 * hp.numel() / seconds(lambda: hp.copy_(lp)),
        "read, amax of fp32": 4 * hp.numel() / seconds(hp.amax),
        "read, sum of fp32": 4 * hp.numel() / seconds(hp.sum),
        "read, amax of int32": 4 * hp.numel() / seconds(ints.amax),
        "write, fill": 4 * hp.numel() / seconds(lambda: hp.fill_(1.0)),
    }


def table(figures: dict[str, Any]) -> str:
    copy = figures["device_copy_GB/s"]
    lines = [f"device copy {copy:.0f} GB/s; torch on flat tensors: {figures['flat']}"]
    for which, ops in figures["sets"].items():
        for name, ways in ops.items():
            cells = [f"{which:6} {name:26}"]
            cells += [
                f"{way} {cell['GB/s'] / copy:.3f} {cell['us']:.0f}us (host {cell['host_us']:.0f})"
                for way, cell in ways.items()
                if way != "bytes"
            ]
            lines.append(" | ".join(cells))
    return "\n".join(lines)


def sweep(groups: list[int], sets: tuple[str, ...]) -> None:
    """The kernels alone, for chunk sizes and grids; prints one line for each."""
    copy = device_copy() / 1e9
    for which in sets:
        bench = Bench(which)
        for size in groups:
            for blocks in (0, plan.EACH_CHUNK):
                plan.GROUPS.update(dict.fromkeys(plan.GROUPS, size))
                plan.BLOCKS.update(dict.fromkeys(plan.BLOCKS, blocks))
                rates = [
                    f"{name} {moved / seconds(ways['kernel'], budget=0.06) / 1e9 / copy:.3f}"
                    for name, (moved, ways) in bench.cases().items()
                ]
                grid = "each" if blocks else "fit "
                print(f"{which:6} groups {size:5} grid {grid}", " | ".join(rates), flush=True)
        del bench
        torch.cuda.empty_cache()


def about() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return {
        "command": "python " + " ".join(["packages/ds-fragment/benchmarks/bench_kernels.py", *sys.argv[1:]]),
        "measured on": f"1x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"driver {lines[0].split(', ')[-1]}",
        "library": {name: text for name, text in kernels.report().items() if name != "library"},
        "about": ABOUT,
    }


def chart(source: Path) -> None:
    """Bars: the fraction of the device copy's speed, by operation and way."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figures = json.loads(source.read_text())
    copy = figures["device_copy_GB/s"]
    names = ["fp32 -> bf16", "bf16 -> fp32", "gather_grads", "norm fp32", "norm bf16"]
    styles = {
        "kernel": ("ds-fragment", "#2f6f9f"),
        "foreach": ("torch's foreach operators", "#d9a441"),
        "torch": ("torch's foreach operators", "#d9a441"),
        "loop": ("loop of copy_", "#b8b8b8"),
    }
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, which in zip(axes, ("large", "small", "odd"), strict=True):
        for at, name in enumerate(names):
            ways = [way for way in styles if way in figures["sets"][which][name]]
            for i, way in enumerate(ways):
                height = figures["sets"][which][name][way]["GB/s"] / copy
                label = styles[way][0] if at == 0 else None
                bar = axis.bar(at + (i - (len(ways) - 1) / 2) * 0.27, height, 0.26, color=styles[way][1], label=label)
                axis.bar_label(bar, fmt="%.2f", fontsize=6)
        axis.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(names)), names, fontsize=7, rotation=12)
        axis.set_title(TITLES[which], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("fraction of device copy speed")
    fig.suptitle(f"measured on {figures['measured on']}; device copy {copy / 1000:.2f} TB/s", fontsize=9)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="lower center", frameon=False)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.savefig(source.with_suffix(".png"), dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--chart", type=Path, help="draw these figures instead of measuring")
    parser.add_argument("--sweep", type=int, nargs="*", help="try these chunk sizes, and grids, instead")
    parser.add_argument("--sets", nargs="*", default=SETS, choices=SETS, help="which sets of tensors")
    args = parser.parse_args()
    if args.chart:
        chart(args.chart)
        return
    if not torch.cuda.is_available():
        print("bench_kernels.py measures a GPU, and there is none here")
        return
    with kernels.use_kernels("cuda"):
        if args.sweep:
            sweep(args.sweep, args.sets)
            return
        figures = about()
        figures["device_copy_GB/s"] = device_copy() / 1e9
        figures["flat"] = {name: round(rate / 1e9) for name, rate in flat_rates().items()}
        torch.cuda.empty_cache()
        figures["sets"] = {which: measure(which) for which in args.sets}
        figures["device_copy_again_GB/s"] = device_copy() / 1e9
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()

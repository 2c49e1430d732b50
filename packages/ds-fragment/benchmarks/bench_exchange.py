"""Read all values, gradients and optimizer state of a sharded model: ds-fragment beside the engines' own ways.

    python packages/ds-fragment/benchmarks/bench_exchange.py --out docs/benchmarks/exchange_cpu.json
    python packages/ds-fragment/benchmarks/bench_exchange.py --chart docs/benchmarks/exchange_cpu.json
    python packages/ds-fragment/benchmarks/bench_exchange.py --cases llama small --engines fsdp2 flat --out ...

It starts its own ranks (2, or --ranks) through torchrun, on GPUs where there are some. All is timed in one run, one
round after the other over all contestants, after two rounds that do not count. In its turn each contestant reads twice,
and the second time counts, so that it does not pay for what another left in the caches; a time is the slowest rank's.
Printed are medians in milliseconds, the ratio to the fastest contestant that is not ds-fragment, and on a GPU the most
memory that is taken beside the model. DeepSpeed takes part where it is installed. With --only the others stay away:

    python packages/ds-fragment/benchmarks/bench_exchange.py --cases llama small --engines fsdp2 --only "bare|FSDP2$"
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ds_fragment
import torch
import torch._dynamo  # torch 2.13 may abort at exit if the first optimizer, which imports it, is made after the group
import torch.distributed as dist
from _shapes import shapes_of
from ds_fragment import tensor_fragment
from torch import nn

Read = Callable[[], Any]


class Bag(nn.Module):
    """Parameters, and a loss that gives each of them a gradient."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator, device=device, dtype=dtype)) for shape in shapes
        )

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        """A scalar from a scalar."""
        return torch.stack([(weight * factor).sum().float() for weight in self.weights]).sum()


def flat(shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, dict[str, Read]]:
    """FlatPartition; there is no other reader of it."""
    model = Bag(shapes, device, torch.bfloat16)
    partition = ds_fragment.FlatPartition(model.parameters())
    optimizer = torch.optim.AdamW([partition.hp_param])
    ds_fragment.attach(model, optimizer)
    for _ in range(2):
        model(torch.full((), 1e-3, device=device)).backward()
        partition.reduce_gradients()
        optimizer.step()
    params = list(model.parameters())
    return {
        what: {
            **mine("FlatPartition", params, what, (model, partition, optimizer)),
            "ds-fragment, FlatPartition, one bucket": lambda what=what: drain(params, what, bucket_bytes=1 << 40),
        }
        for what in QUANTITIES
    }


def fsdp2(shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, dict[str, Read]]:
    """FSDP2: full_tensor() one by one, and PyTorch's consolidated state dicts."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    model = Bag(shapes, device)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    ds_fragment.attach(model, optimizer)
    for _ in range(2):  # the second gradient is not stepped with, and so can be read
        model(torch.full((), 1e-3, device=device)).backward()
        if not optimizer.state:
            optimizer.step()
    params = list(model.parameters())
    full = StateDictOptions(full_state_dict=True)
    large = {"ds-fragment, FSDP2, buckets of 2 GiB": lambda: drain(params, "value", bucket_bytes=2 << 30)}
    return {
        "value": {
            "full_tensor() loop": lambda: [p.full_tensor() for p in params],
            "get_model_state_dict": lambda: get_model_state_dict(model, options=full),
            **mine("FSDP2", params, "value", (model, optimizer)),
            **(large if device.type == "cuda" else {}),
            "ds-fragment, FSDP2, checked": lambda: drain_checked(params, "value"),
        },
        "grad": {
            "full_tensor() loop": lambda: [p.grad.full_tensor() for p in params],
            **mine("FSDP2", params, "grad", (model, optimizer)),
        },
        "exp_avg": {
            "full_tensor() loop": lambda: [optimizer.state[p]["exp_avg"].full_tensor() for p in params],
            "get_optimizer_state_dict (all states)": lambda: get_optimizer_state_dict(model, optimizer, options=full),
            **mine("FSDP2", params, "exp_avg", (model, optimizer)),
        },
    }


def deepspeed(stage: int, shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, dict[str, Read]]:
    """DeepSpeed ZeRO: its own functions one by one, and ds-fragment on the same engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    model = Bag(shapes, device, torch.bfloat16)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ds_fragment.attach(engine)
    engine.backward(engine(torch.full((), 1e-3, device=device)))
    engine.step()
    engine.backward(engine(torch.full((), 1e-3, device=device)))
    params = list(model.parameters())
    name = f"DeepSpeed ZeRO-{stage} loop"
    theirs: dict[str, Read] = {
        "value": lambda: [safe_get_full_fp32_param(p) for p in params],
        "grad": lambda: [safe_get_full_grad(p) for p in params],
        "exp_avg": lambda: [safe_get_full_optimizer_state(p, "exp_avg") for p in params],
    }
    return {
        what: {name: theirs[what], **mine(f"ZeRO-{stage}", params, what, (engine, optimizer))} for what in QUANTITIES
    }


def bare(shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, dict[str, Read]]:
    """One all-gather of as many bytes, which nothing can beat that moves them at once."""
    world_size = dist.get_world_size()
    numel = -(-sum(torch.Size(shape).numel() for shape in shapes) // world_size)
    mine = torch.randn(numel, device=device)
    out = torch.empty(world_size * numel, device=device)

    def gather() -> None:
        dist.all_gather_into_tensor(out, mine)

    return {what: {"one bare all-gather": gather} for what in QUANTITIES}


QUANTITIES = ("value", "grad", "exp_avg")
ABOUT = {
    "mixed": "100 tensors, 20 M elements",
    "tiny": "2,000 tensors of 1,000 elements",
    "small": "600 tensors, 236 M elements",
    "llama": "Llama-3.2-1B, 146 tensors, 1.24 G elements",
}


def mine(engine: str, params: list[nn.Parameter], what: str, alive: object) -> dict[str, Read]:
    """ds-fragment's ways of reading: all at once, and one by one; ``alive`` is what nothing else holds."""
    one: dict[str, Callable[[nn.Parameter], torch.Tensor]] = {
        "value": tensor_fragment.safe_get_full_fp32_param,
        "grad": tensor_fragment.safe_get_full_grad,
        "exp_avg": lambda param: tensor_fragment.safe_get_full_optimizer_state(param, "exp_avg"),
    }
    return {
        f"ds-fragment, {engine}": lambda: drain(params, what, alive),
        f"ds-fragment, {engine}, one by one": lambda: [one[what](p) for p in params],
    }


def drain(params: list[nn.Parameter], what: str, alive: object = None, bucket_bytes: int | None = None) -> None:
    """Read everything, as a caller does who uses one tensor after the other."""
    for _, tensor in ds_fragment.iter_full(params, what, bucket_bytes=bucket_bytes):
        del tensor  # what a caller keeps is the caller's


def drain_checked(params: list[nn.Parameter], what: str) -> None:
    """As `drain`, with every call compared between the ranks first."""
    with ds_fragment.checked():
        drain(params, what)


def contestants(engines: list[str], case: str, device: torch.device) -> Iterator[tuple[str, str, Read]]:
    """(quantity, name, function) of everything that takes part."""
    shapes = shapes_of(case)
    makers: dict[str, Callable[[], dict[str, dict[str, Read]]]] = {
        "bare": lambda: bare(shapes, device),
        "flat": lambda: flat(shapes, device),
        "fsdp2": lambda: fsdp2(shapes, device),
        **{f"zero{stage}": lambda stage=stage: deepspeed(stage, shapes, device) for stage in (1, 2, 3)},
    }
    for engine in engines:
        for what, reads in makers[engine]().items():
            for name, read in reads.items():
                yield what, name, read


def measure(read: Read, device: torch.device) -> float:
    """Milliseconds on the slowest rank, the second time."""
    read()
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    read()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = torch.tensor([(time.perf_counter() - begin) * 1e3], device=device)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


def peak(read: Read, device: torch.device) -> int | None:
    """Bytes of the device's memory that one read takes at most, beside what is there before; its result included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    read()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """All rows of the table."""
    rows = []
    for case in options.cases:
        entered = contestants(options.engines, case, device)
        reads = [(what, name, read) for what, name, read in entered if re.search(options.only, name)]
        times: dict[tuple[str, str], list[float]] = {(what, name): [] for what, name, _ in reads}
        gc.disable()
        for number in range(options.rounds + 2):
            for what, name, read in reads:
                spent = measure(read, device)
                if number >= 2:
                    times[what, name].append(spent)
            gc.collect()
        peaks = {(what, name): peak(read, device) for what, name, read in reads}
        gc.enable()
        for what in QUANTITIES:
            medians = {name: statistics.median(spent) for (w, name), spent in times.items() if w == what}
            peers = [m for name, m in medians.items() if not name.startswith(("ds-fragment", "one bare"))]
            for name, median in sorted(medians.items(), key=lambda item: item[1]):
                rows.append(
                    {
                        "case": case,
                        "quantity": what,
                        "contestant": name,
                        "median_ms": round(median, 3),
                        "min_ms": round(min(times[what, name]), 3),
                        "to_fastest_peer": round(median / min(peers), 3) if peers else None,
                        "to_bare": round(median / medians["one bare all-gather"], 3),
                        "peak_mib": None if (most := peaks[what, name]) is None else round(most / 2**20),
                    }
                )
        del reads
        gc.collect()
    return rows


def chart(source: Path) -> None:
    """Draw the medians of reading all values, beside the JSON; without measuring."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figures = json.loads(source.read_text())
    rows = [row for row in figures["rows"] if row["quantity"] == "value"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    most = max(sum(row["case"] == case for row in rows) for case in cases)
    fig, axes = plt.subplots(1, len(cases), figsize=(6.5 * len(cases), 0.7 + 0.27 * most), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        chosen = sorted((row for row in rows if row["case"] == case), key=lambda row: -row["median_ms"])
        names = [row["contestant"] for row in chosen]
        colors = ["#2f6f9f" if name.startswith("ds-fragment") else "#d9a441" for name in names]
        bars = axis.barh(names, [row["median_ms"] for row in chosen], color=colors)
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{ABOUT[case]}: milliseconds to read all values", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"measured on {figures['about']['machine']}, torch {figures['about']['torch']}", fontsize=8)
    fig.tight_layout()
    fig.savefig(source.with_suffix(".png"), dpi=130)


def write_figures(out: Path, rows: list[dict[str, Any]], rounds: int) -> None:
    """The rows of a run as JSON, with how it was made."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    about = {
        "command": "python " + shlex.join(sys.argv),
        "machine": f"{dist.get_world_size()}x {name}",
        "torch": torch.__version__,
        "backend": dist.get_backend(),
        "rounds": rounds,
    }
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=["mixed", "tiny"])
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--only", default="", help="a regular expression that contestants' names have to match")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chart", type=Path, help="draw these figures instead of measuring")
    options = parser.parse_args()
    if options.chart:
        chart(options.chart)
        return
    gpus = torch.cuda.device_count()
    if "LOCAL_RANK" not in os.environ:
        environment = {
            "OMP_NUM_THREADS": "1",
            # What one contestant's small tensors leave of the memory is to be there for another's large ones.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "LOCAL_SIZE": "0",
            **({} if gpus else {"DS_ACCELERATOR": "cpu"}),
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks or gpus or 2}"]
        os.execve(sys.executable, [sys.executable, *launcher, *sys.argv], {**environment, **os.environ})
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    options.engines = ["bare", *(options.engines or ["flat", "fsdp2", *(["zero1", "zero2", "zero3"] * has_deepspeed)])]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    rows = run(options, device)
    if dist.get_rank() == 0:
        for row in rows:
            print(f"{row['case']:6} {row['quantity']:8} {row['contestant']:40} {row['median_ms']:9.2f} ms", end="")
            if row["to_fastest_peer"] is not None:
                print(f"  {row['to_fastest_peer']:6.2f} x fastest peer", end="")
            print(f"  {row['to_bare']:6.2f} x bare all-gather", end="")
            print("" if row["peak_mib"] is None else f"  {row['peak_mib']:6} MiB")
        if options.out:
            write_figures(options.out, rows, options.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

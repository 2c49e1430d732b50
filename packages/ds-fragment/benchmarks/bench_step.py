"""One training step after the backward pass: FlatPartition with and without the CUDA kernels, beside plain PyTorch.

    python packages/ds-fragment/benchmarks/bench_step.py --out docs/benchmarks/step.json
    python packages/ds-fragment/benchmarks/bench_step.py --device cpu --layers 2 --shrink 32    # does it run at all

A bf16 model of the shapes of Llama-3.2-1B, with random gradients of a scaled loss. Timed are three phases:

- reduce: bf16 gradients -> fp32, unscaled, with their norm and the number that are not finite;
- step: torch.optim.AdamW(fused=True) on the fp32 masters;
- publish: fp32 masters -> bf16 weights.

Plain PyTorch keeps a list of fp32 masters and gradients, and takes `_foreach_copy_`,
`_amp_foreach_non_finite_check_and_unscale_` and `_foreach_norm` to reduce, `_foreach_copy_` to publish. On several GPUs
it is data-parallel: it all-reduces the fp32 gradients, and every rank steps on everything, where FlatPartition
reduce-scatters, steps on a slice and gathers. One GPU needs no launcher; for several it starts itself through torchrun.

All is timed in one run, one round after the other over all contestants, after two rounds that do not count. Times are
between events on the device's stream, host included, of the slowest rank. Gradients are new tensors in every round.
Printed are medians in milliseconds, the ratio to plain PyTorch, and the peak memory that a contestant would take alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ds_fragment
import torch
import torch.distributed as dist
from _shapes import Shape, llama
from torch import nn

PHASES = ("reduce", "step", "publish")
PLAIN = "plain PyTorch"
SCALE = 1024.0
GIB = 2**30

Phases = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


@dataclass
class Contestant:
    """One way to take a step.

    Attributes:
        name: what is printed.
        params: the bf16 weights, which are given gradients before the step.
        phases: what is timed, by PHASES.
        within: what the step is taken within.
        held: bytes that it keeps from step to step, weights included.
        peak: bytes that a step takes at most on top, gradients included.
        times: milliseconds of every round that counts, by PHASES.
    """

    name: str
    params: list[nn.Parameter]
    phases: Phases
    within: Callable[[], AbstractContextManager[None]]
    held: int = 0
    peak: int = 0
    times: list[list[float]] = field(default_factory=list)


class Clock:
    """Marks on the device's stream, or on the host's clock where there is no stream."""

    def __init__(self, device: torch.device) -> None:
        self.on_stream = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self.on_stream:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self.on_stream:
            return [(end - begin) * 1e3 for begin, end in pairs]
        self._marks[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def weights(shapes: list[Shape], device: torch.device) -> list[nn.Parameter]:
    """The same on every rank and for every contestant."""
    generator = torch.Generator(device).manual_seed(0)
    made = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes)
    return [nn.Parameter(weight * 0.02) for weight in made]


def flat(shapes: list[Shape], device: torch.device) -> list[Contestant]:
    """FlatPartition: one, on which the kernels and torch's operators take turns."""
    params = weights(shapes, device)
    partition = ds_fragment.FlatPartition(params)
    optimizer = torch.optim.AdamW([partition.hp_param], lr=1e-4, fused=True)
    phases = (lambda: partition.reduce_gradients(scale=SCALE), optimizer.step, partition.publish)
    choices = ("cuda", "reference") if device.type == "cuda" else ("reference",)
    return [
        Contestant(f"FlatPartition, {choice}", params, phases, partial(ds_fragment.use_kernels, choice))
        for choice in choices
    ]


def plain(shapes: list[Shape], device: torch.device) -> list[Contestant]:
    """What PyTorch offers for it: foreach operators over lists of fp32 masters and gradients."""
    params = weights(shapes, device)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    numels = [param.numel() for param in params]
    grads = torch.zeros(sum(numels), device=device)
    masters = [nn.Parameter(param.detach().float()) for param in params]
    for master, grad in zip(masters, grads.split_with_sizes(numels), strict=True):
        master.grad = grad.view_as(master)
    views = [master.grad for master in masters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    found_inf = torch.zeros(1, device=device)
    inverse = torch.full((1,), 1 / (SCALE * world_size), device=device)

    @torch.no_grad()
    def reduce() -> torch.Tensor:
        torch._foreach_copy_(views, [param.grad for param in params])
        if world_size > 1:
            dist.all_reduce(grads)
        found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(views, found_inf, inverse)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(views)))
        for param in params:
            param.grad = None
        return norm

    @torch.no_grad()
    def publish() -> None:
        torch._foreach_copy_(params, masters)

    return [Contestant(PLAIN, params, (reduce, optimizer.step, publish), nullcontext)]


def allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def take(contestant: Contestant, grads: list[torch.Tensor], device: torch.device) -> list[float]:
    """A step; milliseconds of each phase and of all, of the slowest rank."""
    for param, grad in zip(contestant.params, grads, strict=True):
        param.grad = grad.clone()
    clock = Clock(device)
    if dist.is_initialized():
        dist.barrier()
    if clock.on_stream:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) - sum(grad.nbytes for grad in grads)
    with contestant.within():
        clock.mark()
        for phase in contestant.phases:
            phase()
            clock.mark()
    spans = clock.spans()
    if clock.on_stream:
        contestant.peak = max(contestant.peak, torch.cuda.max_memory_allocated(device) - before)
    spent = torch.tensor([*spans, sum(spans)], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.tolist()


def contestants(shapes: list[Shape], grads: list[torch.Tensor], device: torch.device) -> Iterator[Contestant]:
    """Everything that takes part, after one step each: what it holds by then it keeps."""
    for make in (flat, plain):
        before = allocated(device)
        made = make(shapes, device)
        take(made[0], grads, device)
        held = allocated(device) - before
        for contestant in made:
            contestant.held = held
        yield from made


def differing(one: list[nn.Parameter], other: list[nn.Parameter]) -> int:
    """How many weights are not the same."""
    return sum(int((a.detach() != b.detach()).sum()) for a, b in zip(one, other, strict=True))


def run(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all measured, and all rows of the table."""
    shapes = llama(options.layers, options.shrink)
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator(device).manual_seed(1 + rank)
    grads = [
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * (1e-3 * SCALE)
        for shape in shapes
    ]
    everybody = list(contestants(shapes, grads, device))
    about = {
        "tensors": len(shapes),
        "elements": sum(grad.numel() for grad in grads),
        "weights that differ from plain PyTorch's after one step": differing(everybody[0].params, everybody[-1].params),
    }
    gc.disable()
    for number in range(options.rounds + 2):
        for contestant in everybody:
            spent = take(contestant, grads, device)
            if number >= 2:
                contestant.times.append(spent)
        gc.collect()
    gc.enable()
    medians = {c.name: [statistics.median(spans) for spans in zip(*c.times, strict=True)] for c in everybody}
    rows: list[dict[str, Any]] = []
    for contestant in everybody:
        for i, phase in enumerate((*PHASES, "total")):
            median = medians[contestant.name][i]
            row = {
                "contestant": contestant.name,
                "phase": phase,
                "median_ms": round(median, 3),
                "min_ms": round(min(spans[i] for spans in contestant.times), 3),
                "to_plain": round(median / medians[PLAIN][i], 3),
            }
            if phase == "total" and device.type == "cuda":
                row["held_GiB"] = round(contestant.held / GIB, 3)
                row["peak_GiB"] = round((contestant.held + contestant.peak) / GIB, 3)
            rows.append(row)
    return about, rows


def main() -> None:
    """Start the ranks if there are to be several, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=16, help="of Llama-3.2-1B's")
    parser.add_argument("--shrink", type=int, default=1, help="divide every dimension by this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, help="the number of GPUs unless given; one on a CPU")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("bench_step.py measures a GPU, and there is none here")
        return
    ranks = options.ranks or (torch.cuda.device_count() if on_gpu else 1)
    if ranks > 1 and "LOCAL_RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        os.execve(sys.executable, [sys.executable, *launcher, *sys.argv], {"OMP_NUM_THREADS": "1", **os.environ})
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    about, rows = run(options, device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for row in rows:
            memory = f"  {row['held_GiB']:7.2f} GiB held, {row['peak_GiB']:7.2f} at most" if "held_GiB" in row else ""
            print(f"{row['contestant']:26} {row['phase']:8} {row['median_ms']:9.3f} ms", end="")
            print(f"  {row['to_plain']:6.2f} x plain{memory}")
        if options.out:
            world_size = dist.get_world_size() if dist.is_initialized() else 1
            name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
            about = {
                "command": "python " + " ".join(sys.argv),
                "machine": f"{world_size}x {name}",
                "torch": torch.__version__,
                "rounds": options.rounds,
                **about,
            }
            options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

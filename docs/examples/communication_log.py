"""Train a small model under FSDP2 with a communication log, and look at what it recorded.

    python docs/examples/communication_log.py --out communication-log

It starts two ranks on the CPU, with gloo. The last rank is slow on purpose: it sleeps in every step, as a rank does
whose data come late. The log names it, and shows what the step communicates. The folder then has

- ``operations-RANK.jsonl``: every operation of each rank, a line each;
- ``trace.json``: the timeline of all ranks, for ui.perfetto.dev;
- ``bandwidth.png``: bus bandwidth by message size, drawn by the log;
- ``timeline.png``: the last two steps of the trace, drawn here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it; once a process group exists, that can abort torch 2.13 at exit
import torch.distributed as dist
from ds_logging import CommsLogger, configure, instrument_w_nvtx, log_dist, set_step
from torch import nn
from torch.distributed.fsdp import fully_shard

WIDTHS = (64, 128, 256, 512, 1024, 2048)  # each layer has a message size of its own


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, delay: float) -> None:
    """Train, saying which step it is, what it does and what the loss is."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        set_step(step)  # the operations, the timeline and JSON lines of the log name it
        with instrument_w_nvtx("data"):
            batch = torch.randn(32, WIDTHS[0])
            if rank == world_size - 1:
                time.sleep(delay)
        with instrument_w_nvtx("forward"):
            loss = model(batch).square().mean()
        with instrument_w_nvtx("backward"):
            loss.backward()
        with instrument_w_nvtx("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        log_dist("step %d: loss %.4f", step, mean)
    set_step(None)


def run(steps: int, delay: float, out: Path) -> None:
    """Everything that one rank does."""
    configure("info", format="%(rank_tag)s%(message)s", stream=sys.stdout)
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(WIDTHS) for layer in (nn.Linear(a, b), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with CommsLogger(hang_after=60) as comms:
        train(model, optimizer, steps, delay)

    # All ranks make these calls; they print and write on rank 0.
    comms.summary()
    for report in comms.stragglers():
        waits = {rank: sum(each.get(rank, 0.0) for each in report.waited_for.values()) for rank in report.ranks}
        late = max(waits, key=lambda rank: waits[rank])
        log_dist(
            f"group {report.group}: the others waited {waits[late]:.0f} ms for rank {late}, "
            f"which came last in {report.times_last[late]} of {report.compared} operations"
        )
    comms.to_perfetto(out / "trace.json")
    # These are each rank's own.
    comms.to_jsonl(out / "operations-{rank}.jsonl")
    if dist.get_rank() == 0:
        comms.plot(out / "bandwidth.png")
        draw_timeline(out / "trace.json", out / "timeline.png", steps)
        log_dist(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))}")


def draw_timeline(trace: Path, path: Path, steps: int) -> None:
    """Draw the last two steps of a trace: a row for each track of each rank, a colour for each name."""
    from matplotlib.figure import Figure

    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    begins = {event["args"]["step"]: event["ts"] for event in events if event.get("cat") == "step" and not event["pid"]}
    start = begins[max(steps - 2, 0)]  # microseconds
    slices = [event for event in events if event["ph"] == "X" and event["ts"] + event["dur"] >= start]
    tracks = sorted({(event["pid"], event["cat"] == "communication", event["tid"]) for event in slices})
    names = list(dict.fromkeys(event["name"] for event in slices))
    figure = Figure(figsize=(10, 0.9 + 0.5 * len(tracks)), layout="constrained")
    axes = figure.add_subplot()
    for row, track in enumerate(tracks):
        for event in slices:
            if (event["pid"], event["cat"] == "communication", event["tid"]) == track:
                begin = max(event["ts"], start)
                bar = (begin - start) / 1e3, (event["ts"] + event["dur"] - begin) / 1e3  # milliseconds
                axes.barh(row, bar[1], 0.7, bar[0], color=f"C{names.index(event['name'])}", label=event["name"])
    for step, moment in begins.items():
        if moment >= start:
            axes.axvline((moment - start) / 1e3, color="0.3", linestyle=":")
            axes.text((moment - start) / 1e3, -0.6, f" step {step}", va="bottom", fontsize=8)
    what = {True: "communication", False: "program"}
    axes.set_yticks(range(len(tracks)), [f"rank {rank} {what[communicates]}" for rank, communicates, _ in tracks])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    handles: dict[str, Any] = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--steps", type=int, default=8, help="training steps (8)")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds that the slow rank sleeps in a step (0.02)")
    parser.add_argument("--out", type=Path, default=Path("communication-log"), help="folder for the results")
    options = parser.parse_args()
    if options.ranks < 2 or options.steps < 2:
        parser.error(f"--ranks is {options.ranks} and --steps {options.steps}, expected at least 2 of each")
    if "LOCAL_RANK" not in os.environ:
        options.out.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        os.execve(sys.executable, [sys.executable, *launcher, *sys.argv], environment)
    dist.init_process_group("gloo")
    try:
        run(options.steps, options.delay, options.out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Save a sharded model: how long training stands still, and how much slower its steps are while a file is written.

    torchrun --nproc-per-node 2 packages/ds-fragment/benchmarks/bench_save.py --out docs/benchmarks/save_cpu.json

FSDP2 with fp32 weights, AdamW and, on GPUs, bf16 computation. Each round takes, in turn: steps without a save; a save
in the background and the steps until it is done; a save that is waited for; a full state dict written by `torch.save`;
and `torch.distributed.checkpoint.async_save` with the steps until that is done. Medians over the rounds, in
milliseconds; steps are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ds_fragment
import torch
import torch._dynamo  # torch 2.13 may abort at exit if the first optimizer, which imports it, is made after the group
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class Trainer:
    """A stack of blocks, and its steps."""

    def __init__(self, device: torch.device, width: int, depth: int, rows: int) -> None:
        torch.manual_seed(0)
        with device:
            self.model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))
            self.data = torch.randn(rows, width)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if device.type == "cuda" else MixedPrecisionPolicy()
        for block in self.model:
            fully_shard(block, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.device = device
        self.of_dcp = dist.new_group(backend="gloo")  # which its thread uses while training goes on

    def step(self) -> float:
        """One step; its milliseconds."""
        begin = time.perf_counter()
        self.model(self.data).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def slowest(times: list[float], device: torch.device) -> list[float]:
    """Of each step, the time of the slowest rank."""
    found = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds that the slowest rank stands still, and what came back."""
    synchronize(device)
    dist.barrier()
    begin = time.perf_counter()
    found = call()
    synchronize(device)
    return slowest([1e3 * (time.perf_counter() - begin)], device)[0], found


def steps_until(trainer: Trainer, done: Callable[[], bool], limit: int) -> list[float]:
    """Steps while something is under way on rank 0; all ranks take as many."""
    times: list[float] = []
    flag = torch.zeros((), device=trainer.device)
    for _ in range(limit):
        flag.fill_(float(done()))
        dist.broadcast(flag, 0)
        if bool(flag):
            break
        times.append(trainer.step())
    return slowest(times, trainer.device) if times else []


def one_round(trainer: Trainer, folder: Path, steps: int, found: dict[str, list[float]]) -> None:
    """Everything once."""
    device, model = trainer.device, trainer.model

    def note(name: str, *times: float) -> None:
        found.setdefault(name, []).extend(times)

    note("step", *slowest([trainer.step() for _ in range(steps)], device))
    still, saving = timed(lambda: ds_fragment.save_full(model, folder / "a.safetensors", background=True), device)
    note("ds-fragment, background: stands still", still)
    begin = time.perf_counter()
    note("ds-fragment, background: step", *steps_until(trainer, saving.done, 1000))
    saving.wait()
    note("ds-fragment, background: written after", still + 1e3 * (time.perf_counter() - begin))
    note("step", *slowest([trainer.step() for _ in range(steps)], device))
    note("ds-fragment: stands still", timed(lambda: ds_fragment.save_full(model, folder / "b.safetensors"), device)[0])

    def by_torch() -> None:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            torch.save(state, folder / "c.pt")
        dist.barrier()

    note("full state dict and torch.save: stands still", timed(by_torch, device)[0])
    shutil.rmtree(folder / "dcp", ignore_errors=True) if dist.get_rank() == 0 else None
    dist.barrier()
    still, future = timed(
        lambda: dcp.async_save(get_model_state_dict(model), checkpoint_id=folder / "dcp", process_group=trainer.of_dcp),
        device,
    )
    note("DCP async_save, sharded: stands still", still)
    note("DCP async_save, sharded: step", *steps_until(trainer, future.done, 1000))
    future.result()


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512, help="of the batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="without a save, twice a round")
    parser.add_argument("--folder", type=Path, help="where files are written; a temporary folder unless told")
    parser.add_argument("--machine", default="")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    trainer = Trainer(device, options.width, options.depth, options.rows)
    place = [tempfile.mkdtemp(dir=options.folder)] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(place)
    folder = Path(str(place[0]))
    try:
        one_round(trainer, folder, options.steps, {})  # warm: pinned memory, optimizer state
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            one_round(trainer, folder, options.steps, found)
        nbytes = (folder / "a.safetensors").stat().st_size
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    medians = {name: round(statistics.median(times), 2) for name, times in found.items() if times}
    figures = {
        "command": " ".join(["torchrun", f"--nproc-per-node {dist.get_world_size()}", *sys.argv]),
        "machine": options.machine or (torch.cuda.get_device_name() if has_gpu else "CPU ranks over gloo"),
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "bytes": nbytes,
        "median_ms": medians,
        "samples": {name: len(times) for name, times in found.items()},
        "step_ratio": {
            name.removesuffix(": step"): round(medians[name] / medians["step"], 3)
            for name in medians
            if name.endswith(": step")
        },
    }
    if dist.get_rank() == 0:
        print(json.dumps(figures, indent=1))
        if options.out is not None:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

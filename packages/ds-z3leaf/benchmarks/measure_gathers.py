"""Compare what `LeafPlan.costs` says with what FSDP2 holds on a GPU, and rehearse there.

    python packages/ds-z3leaf/benchmarks/measure_gathers.py --json docs/benchmarks/leaves_1xh200.json

One process with NCCL: FSDP2 copies every unit into an all-gather buffer also on one rank. The forward runs without
gradients, so that next to no activations are kept; the peak is what is allocated beyond what the sharded model holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ds_z3leaf import find_leaf_candidates, plan_leaves, rehearse
from torch import nn


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(x).relu())
        return out


class Mixture(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(Expert(width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.experts[index](x[rows]) * weight[rows].unsqueeze(-1))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.mlp = Mixture(width, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.mlp(self.mix(x))
        return out


class Net(nn.Module):
    def __init__(self, width: int, count: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, count) for _ in range(layers))
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x)
        return out


def make(device: torch.device) -> Net:
    """About 1.1 GiB of parameters."""
    torch.manual_seed(0)
    with device:
        return Net(1024, 8, 4)


def measure_peak(device: torch.device, layers: Any, root: bool) -> dict[str, int]:
    """Bytes allocated at once in a forward, beyond the sharded model."""
    model = make(device)
    plan = plan_leaves(model, "auto")
    plan.apply_fsdp2(layers=layers, root=root)
    x = torch.randn(64, 1024, device=device)
    with torch.no_grad():
        model(x)
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x)
        torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before}


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=device)

    model = make(device)
    state, rng = {name: value.clone() for name, value in model.state_dict().items()}, torch.cuda.get_rng_state()
    start = time.perf_counter()
    plan = rehearse(model, [torch.randn(rows, 1024) for rows in (3, 200)])
    seconds = time.perf_counter() - start
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    rehearsal = {
        "leaves": [leaf.name for leaf in plan.leaves],
        "device": plan.rehearsal.device if plan.rehearsal else None,
        "seconds": round(seconds, 3),
        "model_unchanged": same and torch.equal(rng, torch.cuda.get_rng_state()),
        "candidates": [candidate.name for candidate in find_leaf_candidates(model)],
    }
    costs = {row.cut: row.to_dict() for row in plan.costs()}
    del model, state
    measured = {"layers": measure_peak(device, "auto", True)}
    figures = {
        "command": "python packages/ds-z3leaf/benchmarks/measure_gathers.py",
        "machine": f"1x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        "python": platform.python_version(),
        "rehearsal": rehearsal,
        "costs": costs,
        "measured": measured,
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What it costs to find, mark and name leaves in a model of 48,602 modules, beside DeepSpeed's own functions.

    python packages/ds-z3leaf/benchmarks/bench_leaves.py [--quick] [--json PATH]

The model has 300 layers of a mixture of 52 experts each, on meta. Ways run by turns, each on a model without flags, and
CPU time of the process is counted; medians. Typos: eight selectors of a kind, each of which misses by a letter or two.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ds_z3leaf import LeafNotFoundError, find_fine_grained, find_leaf_candidates, mark_leaves, plan_leaves
from torch import nn

LAYERS, EXPERTS = 300, 52


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(2, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[self.gate(x).argmax(-1).item()](x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm, self.mlp = nn.Linear(2, 2), nn.LayerNorm(2), Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(self.self_attn(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


TYPOS: dict[str, list[str]] = {
    "names": [f"layers.{i}.mpl.experts.{i}" for i in range(8)],
    "classes": ["Mxture", "Exprt", "Layr", "Lniear", "Modle", "ModulList", "LayerNrm", "Mixtures"],
    "suffixes": ["0.mpl", "7.mpl", "up_prj", "self_atn", "exprts.3", "nrm", "3.experts.1.upproj", "gat"],
    "globs": [
        "layers.*.mpl",
        "**.mpl",
        "layer.*.mlp",
        "**.up_prj",
        "**.exprts.*",
        "layers.[0-3].mpl",
        "**.gat",
        "x.*.mlp",
    ],
    "regexes": [
        *(r"layers\.\d+\.mpl", "mlp", r".*\.mpl", r"layer\.\d+\.mlp"),
        *(r".*up_prj", r"layers\.[0-9]+\.self_atn", "gate", r"layers\.400\.mlp"),
    ],
}


def clear(model: nn.Module) -> None:
    """Take all flags away, whoever set them."""
    for module in model.modules():
        for name in ("_z3_leaf", "_ds_leaf_reason"):
            module.__dict__.pop(name, None)
    for param in model.parameters():
        if hasattr(param, "ds_z3_leaf_module"):
            del param.ds_z3_leaf_module


def miss(model: nn.Module, argument: str) -> None:
    try:
        mark_leaves(model, **{argument: TYPOS[argument]})  # type: ignore[arg-type]
    except LeafNotFoundError:
        return
    raise RuntimeError(f"a typo among {argument} matches something")


def by_turns(model: nn.Module, ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median CPU seconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            clear(model)
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with torch.device("meta"):
        model = Model()
    count = sum(1 for _ in model.modules())
    names = [f"layers.{i}.mlp" for i in range(LAYERS)]
    ways: dict[str, Callable[[], Any]] = {
        "mark, classes": lambda: mark_leaves(model, classes=Mixture),
        "mark, 300 names": lambda: mark_leaves(model, names=names),
        "mark, suffixes": lambda: mark_leaves(model, suffixes="mlp"),
        "mark, globs": lambda: mark_leaves(model, globs="layers.*.mlp"),
        "mark, regexes": lambda: mark_leaves(model, regexes=r"layers\.\d+\.mlp"),
        "mark, auto": lambda: mark_leaves(model, "auto"),
        "find_leaf_candidates": lambda: find_leaf_candidates(model),
        "find_fine_grained": lambda: find_fine_grained(model, max_elements_per_module=4),
        "costs of a plan": lambda: plan_leaves(model, classes=Mixture).costs(),
        **{f"8 typos, {argument}": lambda argument=argument: miss(model, argument) for argument in TYPOS},  # type: ignore[misc]
    }
    try:
        import deepspeed
        from deepspeed import utils
    except ImportError:
        print("DeepSpeed is not installed: its figures are left out", file=sys.stderr)
        deepspeed_version = None
    else:
        deepspeed_version = deepspeed.__version__
        ways["DeepSpeed, classes"] = lambda: utils.set_z3_leaf_modules(model, [Mixture])
        ways["DeepSpeed, 300 names"] = lambda: utils.set_z3_leaf_modules_by_name(model, names)
        ways["DeepSpeed, suffixes"] = lambda: utils.set_z3_leaf_modules_by_suffix(model, ["mlp"])
    times = {what: 1e3 * seconds for what, seconds in by_turns(model, ways, 3 if arguments.quick else 15).items()}
    for what, milliseconds in times.items():
        print(f"{what:32} {milliseconds:8.1f} ms")
    if arguments.json:
        found = {
            "command": "python packages/ds-z3leaf/benchmarks/bench_leaves.py --json PATH",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed_version,
            "cores_of_this_machine": os.cpu_count(),
            "modules": count,
            "cpu_milliseconds": times,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Checkpoints of a real engine to safetensors: DeepSpeed's script beside `consolidate`.

    python packages/ds-fragment/benchmarks/bench_zero_checkpoint.py --layers 7 21 --rounds 3 \\
        --out docs/benchmarks/zero_checkpoint.json

Two ranks of DeepSpeed make ZeRO-2 and ZeRO-3 checkpoints of a bf16 model with fp32 weights and Adam's state. Each
program then runs in a process of its own, in turns. Printed are medians over the rounds: seconds of the whole process
and of the conversion alone, and the resident memory at most, and after the imports. Both write in one process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Each prints the seconds of the conversion, and the KiB of memory after the imports and at most.
END = """
spent = time.perf_counter() - begin
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": spent, "imported": imported, "most": most}), file=result)
"""
SHAPES = [(1024, 1024)] * 4 + [(1024, 4096), (4096, 1024)]
LAYER = sum(a * b + b for a, b in SHAPES)  # parameters
BEGIN = """
import json, os, resource, sys, time
result = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
folder, out = sys.argv[1:]
"""
PROGRAMS = {
    "deepspeed": """
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
convert_zero_checkpoint_to_fp32_state_dict(folder, out, safe_serialization=True)
""",
    "ds-fragment": """
from ds_fragment.zero_checkpoint import consolidate
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
consolidate(folder, out)
""",
}


def make(folder: Path, stage: int, layers: int) -> None:
    """Save a checkpoint; each of two ranks calls it."""
    import deepspeed
    import torch
    from torch import nn

    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    torch.manual_seed(0)
    blocks = [nn.Sequential(*(nn.Linear(a, b) for a, b in SHAPES)) for _ in range(layers)]
    model = nn.Sequential(*blocks)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    engine.backward(engine(torch.ones(1, 1024, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    engine.save_checkpoint(str(folder), tag="made")


def run(program: str, folder: Path) -> dict[str, float]:
    """One conversion in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        command = [sys.executable, "-c", BEGIN + PROGRAMS[program] + END, str(folder), out]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        found["process_seconds"] = time.perf_counter() - begin
        return found


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Medians of each program, one round of all after the other; the first does not count."""
    taken: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    for _ in range(rounds + 1):
        for program, found in taken.items():
            found.append(run(program, folder))
    rows = []
    for program, found in taken.items():
        median = {key: statistics.median(each[key] for each in found[1:]) for key in found[0]}
        seconds = {"process_s": round(median["process_seconds"], 2), "convert_s": round(median["seconds"], 3)}
        memory = {"peak_mib": round(median["most"] / 1024), "imports_mib": round(median["imported"] / 1024)}
        rows.append({"program": program, **seconds, **memory})
    return rows


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=[7], nargs="*", help="of 12.6 million parameters")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; a temporary folder by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make(options.folder, options.make, options.layers[0])
        return
    rows = []
    for layers in options.layers:
        for stage in (2, 3):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                saved = Path(folder, "saved")
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                asked = [__file__, "--make", str(stage), "--layers", str(layers), "--folder", str(saved)]
                environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
                subprocess.run([sys.executable, *launch, *asked], check=True, env=environment, stdout=sys.stderr)
                size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
                for row in measure(saved, options.rounds):
                    sizes = {"checkpoint_mib": round(size / 2**20), "weights_mib": round(layers * LAYER / 2**18)}
                    rows.append({"stage": stage, **sizes, **row})
                    print(json.dumps(rows[-1]), flush=True)
                shutil.rmtree(saved)
    if options.out:
        about = {
            "command": "python " + shlex.join(sys.argv),
            "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "torch": importlib.metadata.version("torch"),
            "deepspeed": importlib.metadata.version("deepspeed"),
            "rounds": options.rounds,
        }
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

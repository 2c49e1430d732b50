"""What an NVTX range costs: ours, the nvtx package's, torch's and DeepSpeed's.

    python packages/ds-logging/benchmarks/bench_nvtx.py [--quick] [--json PATH]

An empty function is called inside each, in turn; medians, in nanoseconds over a bare call. Each state is a process of
its own: NVTX asks once whether a tool is attached. The tool is the one of the tests, kept quiet. Peers that are not
installed, or cannot draw, are left out and named. A C compiler must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

STATES = ("no tool", "tool attached", "tool attached, switched off")
TOOL = pathlib.Path(__file__).parents[1] / "tests" / "nvtx_tool.c"


def bare() -> None:
    return None


def contestants(left_out: dict[str, str]) -> dict[str, Callable[[], object]]:
    """By name, a call of an empty function inside a range."""
    from ds_logging import instrument_w_nvtx

    def block() -> None:
        with instrument_w_nvtx("f"):
            pass

    found: dict[str, Callable[[], object]] = {
        "ds_logging.instrument_w_nvtx": instrument_w_nvtx(lambda: None, message="f"),
        "ds_logging.instrument_w_nvtx, block": block,
    }
    try:
        import nvtx
    except ImportError:
        left_out["nvtx.annotate"] = "not installed"
    else:

        def annotated() -> None:
            with nvtx.annotate("f", domain="ds"):
                pass

        found["nvtx.annotate"] = nvtx.annotate("f", domain="ds")(lambda: None)
        found["nvtx.annotate, block"] = annotated
    with contextlib.suppress(ImportError):
        import torch

        if hasattr(torch._C, "_nvtx"):

            def torch_block() -> None:
                with torch.cuda.nvtx.range("f"):
                    pass

            found["torch.cuda.nvtx.range, block"] = torch_block
        else:
            left_out["torch.cuda.nvtx.range"] = "this torch was built without CUDA"
    try:
        import deepspeed.utils.nvtx as theirs
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    except ImportError:
        left_out["deepspeed.utils.instrument_w_nvtx"] = "not installed"
    else:
        accelerator: Any = CUDA_Accelerator.__new__(CUDA_Accelerator)  # as on a GPU, whatever is here
        accelerator._nvtx_domains = {}
        theirs.get_accelerator = lambda: accelerator
        if getattr(accelerator, "supports_nvtx_domain", False) or "torch.cuda.nvtx.range, block" in found:
            found["deepspeed.utils.instrument_w_nvtx"] = theirs.instrument_w_nvtx(bare)
        else:
            left_out["deepspeed.utils.instrument_w_nvtx"] = "draws through torch, which has no NVTX here"
    return found


def measure(state: str, count: int, rounds: int) -> dict[str, Any]:
    """Nanoseconds over a bare call, in this process."""
    import ds_logging.nvtx

    left_out: dict[str, str] = {}
    calls = {"bare": bare, **contestants(left_out)}
    if state == STATES[2]:
        ds_logging.nvtx.enable_nvtx = False
        with contextlib.suppress(KeyError):
            sys.modules["deepspeed.utils.nvtx"].enable_nvtx = False  # type: ignore[attr-defined]
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter_ns()
            for _ in range(count):
                call()
            if turn:
                samples[name].append((time.perf_counter_ns() - begun) / count)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    floor = medians.pop("bare")
    return {"bare_ns": floor, "over_bare_ns": {n: m - floor for n, m in medians.items()}, "left_out": left_out}


def in_a_process(state: str, tool: str, quick: bool) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "NVTX_TOOL_QUIET": "1"}
    environment.pop("NVTX_INJECTION64_PATH", None)
    if state != STATES[0]:
        environment["NVTX_INJECTION64_PATH"] = tool
    command = [sys.executable, __file__, "--state", state, *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--state", choices=STATES, help="measure one state, in this process")
    options = parser.parse_args()
    if options.state is not None:
        print(json.dumps(measure(options.state, *((300, 5) if options.quick else (3000, 31)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            sys.exit("a C compiler (cc, gcc or clang) must be there to build the tool")
        tool = str(pathlib.Path(folder, "tool.so"))
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", tool, str(TOOL)], check=True)
        results = {state: in_a_process(state, tool, options.quick) for state in STATES}
    print(f"{'nanoseconds over a bare call':42s}" + "".join(f"{state:>30s}" for state in STATES))
    for name in results[STATES[0]]["over_bare_ns"]:
        print(f"{name:42s}" + "".join(f"{results[state]['over_bare_ns'][name]:30.0f}" for state in STATES))
    print(f"{'a bare call takes':42s}" + "".join(f"{results[state]['bare_ns']:30.0f}" for state in STATES))
    for name, why in results[STATES[0]]["left_out"].items():
        print(f"left out: {name}: {why}")
    if options.json:
        versions = {}
        for package in ("nvtx", "torch", "deepspeed"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        about = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
        options.json.write_text(json.dumps({"about": {**about, **versions}, "states": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

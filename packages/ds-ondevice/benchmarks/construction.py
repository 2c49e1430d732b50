"""What construction inside ``OnDevice`` costs, beside PyTorch's own way and the peers that are installed.

    python packages/ds-ondevice/benchmarks/construction.py [--quick] [--only abcdef] [--json PATH]

On one CPU thread, in one run, interleaved and warm, with ``gc.collect`` in between; medians. Peers that are not
installed, or fail, are named and left out. A row's goal is for the line marked ``*``; the baseline has ratio 1.00.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import contextlib
import gc
import importlib
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from ds_ondevice import OnDevice, materialize
from torch import nn

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
Context = Callable[[], Any]  # makes a context manager
Way = Callable[[], dict[str, float]]  # does something; milliseconds by the name of the part
BF16, FP32 = torch.bfloat16, torch.float32
MIB = 2**20


@dataclass
class Row:
    """One comparison; ``limit`` is the largest value of ``ours`` that meets ``goal``, in ``unit``."""

    section: str
    case: str
    baseline: str
    ours: str
    goal: str = ""
    limit: float | None = None
    unit: str = "ms"
    medians: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def finish(self, samples: dict[str, list[float]], *, times: float = 0.0, plus: float = 0.0) -> Row:
        """Take the medians, and set the limit to ``baseline * times + plus`` unless there is no goal."""
        self.medians = {name: statistics.median(values) for name, values in samples.items()}
        base = self.medians[self.baseline]
        self.ratios = {name: value / base for name, value in self.medians.items()}
        self.limit = base * times + plus if self.goal else None
        return self

    def compare(self, ways: dict[str, Way], rounds: int, times: float) -> Row:
        """Call every way in turn, ``rounds`` times after one that does not count."""
        samples: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for name in [name for name in ways if name not in self.failed]:
                gc.collect()
                try:
                    taken = ways[name]()
                except Exception as error:
                    self.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
                    continue
                for part, milliseconds in taken.items() if turn else ():
                    samples.setdefault(f"{name}{part}", []).append(milliseconds)
        return self.finish(samples, times=times)

    def show(self) -> None:
        print(f"\n{self.section}) {self.case}")
        for name, value in self.medians.items():
            mark = "*" if name == self.ours else " "
            print(f"  {mark} {name:42s} {value:10.2f} {self.unit:3s} {self.ratios[name]:6.2f}x")
        for name, error in self.failed.items():
            print(f"    {name:42s} {error}")
        if self.limit is not None:
            met = "met" if self.medians[self.ours] <= self.limit else "MISSED"
            print(f"    goal {self.goal}: at most {self.limit:.2f} {self.unit}: {met}", flush=True)


def inside(context: Context, work: Callable[[], Any]) -> Way:
    """A way: ``work`` inside a context; what it made is freed after the clock has stopped."""

    def way() -> dict[str, float]:
        start = time.perf_counter()
        with context():
            made = work()
        taken = (time.perf_counter() - start) * 1e3
        del made
        return {"": taken}

    return way


@contextlib.contextmanager
def default(dtype: torch.dtype, also: Any = contextlib.nullcontext()) -> Iterator[None]:  # noqa: B008
    torch.set_default_dtype(dtype)
    try:
        with also:
            yield
    finally:
        torch.set_default_dtype(FP32)


def installed(name: str) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out")
        return None


def small(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(count))


class Block(nn.Module):
    """A layer of Llama's shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        dim = width // heads
        inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)


class Llama(nn.Module):
    """24 layers, initialised once more as a whole, as GPT code does it."""

    def __init__(self, width: int = 256, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(24))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)


def python(code: str) -> float:
    """The number that a fresh Python prints last."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


FIRST = """
import time, torch
from torch import nn
from ds_ondevice import OnDevice
torch.set_num_threads(1)
start = time.perf_counter()
with {context}:
    nn.Linear(8, 8)
print((time.perf_counter() - start) * 1e3)
"""


def first_use(rounds: int) -> Iterator[Row]:
    row = Row("a", "first block of a process", 'torch.device("meta")', "OnDevice(None)", "at most 20 ms more")
    samples: dict[str, list[float]] = {}
    for name in (row.baseline, row.ours, 'OnDevice(None, "cpu")') * rounds:
        samples.setdefault(name, []).append(python(FIRST.format(context=name)))
    yield row.finish(samples, times=1, plus=20)


def on_meta(rounds: int) -> Iterator[Row]:
    accelerate, deepspeed = installed("accelerate"), installed("deepspeed")
    transformers = installed("transformers")
    contexts: dict[str, Context] = {
        'torch.device("meta")': lambda: torch.device("meta"),
        'OnDevice("meta")': lambda: OnDevice(device="meta"),
        "no block": contextlib.nullcontext,
    }
    if accelerate is not None:
        contexts["accelerate.init_empty_weights"] = lambda: accelerate.init_empty_weights(include_buffers=True)
    if deepspeed is not None:
        contexts["deepspeed.OnDevice"] = lambda: deepspeed.OnDevice(dtype=FP32, device="meta")
    models: dict[str, Callable[[], Any]] = {"24 layers of Llama's shape": Llama}
    if transformers is not None:
        transformers.logging.set_verbosity_error()
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "vocab_size": 1000}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=24)
        models["transformers' LlamaForCausalLM, 24 layers"] = lambda: transformers.LlamaForCausalLM(config)
    for name, build in models.items():
        row = Row("b", f"{name}, on meta", 'torch.device("meta")', 'OnDevice("meta")', "1.3x")
        ways = {way: inside(context, build) for way, context in contexts.items()}
        yield row.compare(ways, rounds, 1.3)


def record_and_replay(rounds: int, count: int) -> Iterator[Row]:
    def ours() -> dict[str, float]:
        start = time.perf_counter()
        with OnDevice(device="meta"):
            modules = small(count)
        recorded = time.perf_counter()
        materialize(modules, "cpu")
        end = time.perf_counter()
        parts = {"": end - start, ", recording": recorded - start, ", materialize": end - recorded}
        return {part: seconds * 1e3 for part, seconds in parts.items()}

    row = Row("c", f"{count} small Linear, to the CPU", "eager", "OnDevice and materialize", "2x")
    ways = {"eager": inside(contextlib.nullcontext, lambda: small(count)), row.ours: ours}
    yield row.compare(ways, rounds, 2)


def on_cpu(section: str, case: str, prepare: Callable[[], Callable[[], Any]], rounds: int) -> Iterator[Row]:
    """Compare blocks on the CPU, in fp32 and bf16; ``prepare`` runs under the dtype and gives what runs inside."""
    deepspeed = installed("deepspeed")
    for label, dtype in (("fp32", FP32), ("bf16", BF16)):
        with default(dtype):
            work = prepare()
        plain, ours = f'torch.device("cpu"), default {label}', f'OnDevice({label}, "cpu")'
        contexts: dict[str, Context] = {
            plain: lambda dtype=dtype: default(dtype, torch.device("cpu")),
            ours: lambda dtype=dtype: OnDevice(dtype, "cpu"),
            f"set_default_dtype({label})": lambda dtype=dtype: default(dtype),
            "no block": contextlib.nullcontext,
        }
        if deepspeed is not None:
            contexts["deepspeed.OnDevice"] = lambda dtype=dtype: deepspeed.OnDevice(dtype=dtype, device="cpu")
        row = Row(section, f"{case}, {label} on the CPU", plain, ours, "1.1x")
        yield row.compare({name: inside(context, work) for name, context in contexts.items()}, rounds, 1.1)


def forward() -> Callable[[], Any]:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(4)))
    x = torch.randn(2, 8, 32)
    return lambda: [model(x) for _ in range(20)]


PEAK = """
import re, torch
from torch import nn
from ds_ondevice import OnDevice, materialize
torch.set_num_threads(1)
def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
def build(count, width):
    {body}
build(1, 8)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
start = kib("VmRSS")
model = build(8, {width})
print((kib("VmHWM") - start) / 1024)
"""


def peak_memory(rounds: int, width: int) -> Iterator[Row]:
    model, one = (count * width * width * 2 / MIB for count in (8, 1))
    linears = "nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))"
    meta = f"with OnDevice(torch.bfloat16):\n        model = {linears}\n    materialize(model, 'cpu')\n    return model"
    bodies = {
        'OnDevice(bf16, "cpu")': f"with OnDevice(torch.bfloat16, 'cpu'):\n        return {linears}",
        "OnDevice(bf16) and materialize": meta,
        "set_default_dtype(bf16)": f"torch.set_default_dtype(torch.bfloat16)\n    return {linears}",
        "fp32, then .bfloat16()": f"return {linears}.bfloat16()",
    }
    for ours, *peers in (list(bodies)[:1] + list(bodies)[2:], list(bodies)[1:2]):
        row = Row("f", f"peak memory, 8 Linear({width}, {width}) in bf16", "the model's bytes", ours, unit="MiB")
        row.goal = "the model, one tensor, and 2 MiB"
        samples: dict[str, list[float]] = {row.baseline: [model]}
        for name in [ours, *peers] * rounds:
            samples.setdefault(name, []).append(python(PEAK.format(body=bodies[name], width=width)))
        yield row.finish(samples, times=1, plus=one + 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a smoke test")
    parser.add_argument("--only", default="abcdef", help="sections to run")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    options = parser.parse_args()
    rounds, scale = (2, 20) if options.quick else (7, 1)
    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "a": lambda: first_use(rounds),
        "b": lambda: on_meta(rounds),
        "c": lambda: record_and_replay(rounds, 8000 // scale),
        "d": lambda: on_cpu("d", f"{1500 // scale} small Linear", lambda: lambda: small(1500 // scale), rounds),
        "e": lambda: on_cpu("e", "20 forward passes", forward, rounds),
        "f": lambda: peak_memory(min(rounds, 3), 2048),
    }
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {rounds} rounds, 1 thread")
    rows = []
    for section in options.only:
        for row in sections[section]():
            row.show()
            rows.append(asdict(row))
    if options.json:
        found = {"torch": torch.__version__, "python": platform.python_version(), "rows": rows}
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

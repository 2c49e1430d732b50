"""Materialize a model on a GPU: time and peak memory, beside eager construction there.

    python packages/ds-ondevice/benchmarks/replay_cuda.py [--width 2048] [--json PATH]

It needs one GPU. Construction and replay run by turns; the medians of five are printed. The model has Llama's shape and
is initialised twice, as transformers' models are: by its own layers, then by one pass over all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from construction import Llama
from ds_ondevice import OnDevice, load_into, materialize
from torch import nn


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and MiB above what was allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, start = torch.cuda.memory_allocated(), time.perf_counter()
    made = work()
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - held
    del made
    return seconds, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("replay_cuda.py measures a GPU, and there is none here")
        return

    def build() -> nn.Module:
        return Llama(given.width, 32000)

    def eager() -> nn.Module:
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                return build()
        finally:
            torch.set_default_dtype(torch.float32)

    samples: dict[str, list[tuple[float, float]]] = {}
    folder = Path(tempfile.mkdtemp())
    for turn in range(6):
        torch.manual_seed(turn)
        reference = measured(eager)
        start = time.perf_counter()
        with OnDevice(torch.bfloat16, device="meta"):
            model = build()
        recording = time.perf_counter() - start
        torch.manual_seed(turn)
        replay = measured(lambda model=model: materialize(model, "cuda"))
        torch.manual_seed(turn)
        expected = eager().state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        nbytes = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        if turn == 0:
            from safetensors.torch import save_file

            save_file(expected, folder / "model.safetensors")
        with OnDevice(torch.bfloat16, device="meta"):
            other = build()
        loaded = measured(lambda other=other: load_into(other, folder, "cuda"))
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in expected.items()) or turn
        del model, other, expected
        if turn:  # the first one warms up
            for name, value in (("eager on the GPU", reference), ("replay", replay), ("load_into", loaded)):
                samples.setdefault(name, []).append(value)
            samples.setdefault("recording", []).append((recording, 0.0))
    figures = {
        name: {
            part: statistics.median(values)
            for part, values in zip(("s", "peak_mib"), zip(*taken, strict=True), strict=True)
        }
        for name, taken in samples.items()
    }
    figures["model"] = {"mib": nbytes}
    device = torch.cuda.get_device_name()
    result = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "figures": figures}
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

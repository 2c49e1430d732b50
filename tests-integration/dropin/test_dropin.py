"""The real DeepSpeed on our modules trains bit for bit as with its own: the same program in both modes, `train`.

Both modes run all scenarios once, then DeepSpeed's own modules load the checkpoints that ours wrote. A test is one
scenario, compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deepspeed"))  # `engines`, which `scenarios` imports
sys.path.insert(0, str(Path(__file__).resolve().parent))

from observe import NOTHING, RAISED
from scenarios import SCENARIOS

HERE = Path(__file__).resolve().parent
RANKS = 2
START = 280.0  # seconds until the first scenario; the first start on a machine compiles DeepSpeed's operator
LIMIT = 40.0  # seconds that one scenario may take; most take a fifth of one
WHOLE = START + 120.0  # seconds that all of them may take in one mode
CHECKPOINTS = ("checkpoint", "universal")
ENV = {
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "4",  # as for `engines.ENV`
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed has its gate compiled, which takes longer than all the rest
    "GLOO_SOCKET_IFNAME": "lo",
    "WORLD_SIZE": str(RANKS),
    "LOCAL_WORLD_SIZE": str(RANKS),
}

NAMES = [*SCENARIOS, "again"]
pytestmark = pytest.mark.timeout(3 * WHOLE + 60)  # the first test waits for all three runs
Result = dict[str, Any]


class Runs:
    """The results of the three runs by scenario, and how each run ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: dict[str, str] = {}
        self.results: dict[str, dict[str, Result]] = {}

    def run(self, name: str, mode: str, loads: str | None = None, only: tuple[str, ...] | None = None) -> None:
        """Run a mode on all ranks, and take what it wrote; a failure is told by the scenarios that it kept away."""
        out = self.folder / f"{name}.json"
        arguments = {
            "mode": mode,
            "out": str(out),
            "store": str(self.folder / f"{name}.store"),
            "start": START,
            "limit": LIMIT,
        }
        arguments |= {"saves": str(self.folder / name), "only": only}
        arguments["loads"] = None if loads is None else str(self.folder / loads)
        command = [sys.executable, str(HERE / "train.py"), json.dumps(arguments)]
        logs = [self.folder / f"{name}.{rank}.log" for rank in range(RANKS)]
        processes = []
        for rank, log in enumerate(logs):
            env = {**os.environ, **ENV, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        deadline = time.monotonic() + WHOLE
        try:
            for process in processes:
                process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        ends = [f"rank {rank} ended with {process.returncode}" for rank, process in enumerate(processes)]
        self.ends[name] = "\n".join(f"{end}:\n{log.read_text()[-3000:]}" for end, log in zip(ends, logs, strict=True))
        lines = out.read_text().splitlines() if out.exists() else []
        self.results[name] = {line["name"]: line for line in map(json.loads, lines)}

    def of(self, run: str, scenario: str) -> Result:
        """What a run has of a scenario; skips or fails the test where that is nothing."""
        found = self.results[run].get(scenario)
        if found is None:
            pytest.fail(f"{run}: {scenario} has no result\n{self.ends[run]}")
        if "raised" in found:
            pytest.fail(f"{run}: {scenario} raised\n" + "\n".join(found["raised"]))
        if "skipped" in found:
            pytest.skip(f"{run}: {found['skipped']}")
        result: Result = found["result"]
        return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("dropin"))
    found.run("own", "own")
    found.run("ours", "ours", loads="own")
    found.run("own again", "own", loads="ours", only=CHECKPOINTS)
    return found


def differences(own: Any, ours: Any, path: str = "") -> Iterator[str]:
    """Where two results differ; where DeepSpeed's reader has no answer, ours may have one."""
    if isinstance(own, dict) and isinstance(ours, dict):
        for key in sorted(own.keys() | ours.keys()):
            yield from differences(own.get(key, "missing"), ours.get(key, "missing"), f"{path}/{key}")
    elif isinstance(own, list) and isinstance(ours, list) and len(own) == len(ours):
        for index, (left, right) in enumerate(zip(own, ours, strict=True)):
            yield from differences(left, right, f"{path}/{index}")
    elif isinstance(own, str) and own.startswith(RAISED):
        yield f"{path}: DeepSpeed's {own}"
    elif own not in (ours, NOTHING):
        yield f"{path}: DeepSpeed has {own}, ours {ours}"


def check(own: Result, ours: Result) -> None:
    found = list(differences(own, ours))
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("scenario", [name for name in NAMES if name != "ulysses-mesh-sequence"])
def test_ours_trains_as_deepspeed(runs: Runs, scenario: str) -> None:
    own, ours = runs.of("own", scenario), runs.of("ours", scenario)
    crossed = ours.pop("crossed", None)
    check(own, ours)
    if scenario.startswith(CHECKPOINTS):
        check(own["loaded"], crossed)


@pytest.mark.parametrize("scenario", [name for name in NAMES if name.startswith("checkpoint")])
def test_a_loaded_checkpoint_goes_on_as_what_was_saved(runs: Runs, scenario: str) -> None:
    own = runs.of("own", scenario)
    check(own["went on"], own["loaded"])


@pytest.mark.parametrize("scenario", [name for name in NAMES if name.startswith(CHECKPOINTS)])
def test_deepspeed_loads_what_ours_saved(runs: Runs, scenario: str) -> None:
    """In a process in which no module of ours can be imported."""
    check(runs.of("own", scenario)["loaded"], runs.of("own again", scenario)["crossed"])


def test_sequence_parallel_mesh_trains_as_sequence_parallel_mpu(runs: Runs) -> None:
    """Over a mesh DeepSpeed leaves sequence parallel ranks out of the gradients' mean, and their weights drift apart.

    Ours takes them in, as DeepSpeed does with an mpu. Up to the first step both are the same.
    """
    own, ours = runs.of("own", "ulysses-mesh-sequence"), runs.of("ours", "ulysses-mesh-sequence")
    right = runs.of("own", "ulysses-mpu")["zero1"]
    assert [losses[0] for losses in own["losses"]] == [losses[0] for losses in ours["losses"]]
    assert len(set(own["weights"])) == RANKS  # once this fails, compare it as all others
    for what in ("losses", "weights", "held", "fp32", "grad", "exp_avg"):
        check(right[what], ours[what])

"""``ds_numa.bind()`` in processes that real launchers started: what each rank is bound to, and what it says."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ds_numa._launchers import LAUNCHERS

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
VARIABLES = {name for launcher in LAUNCHERS for name in launcher[1:] if name} | {"DS_NUMA_BOUND", "KMP_AFFINITY"}

SCRIPT = """
import json, os, sys
from pathlib import Path
import ds_numa
report = ds_numa.bind(devices=None)
facts = {"rank": report.local_rank, "cpus": report.cpus, "real": sorted(os.sched_getaffinity(0)), "text": str(report)}
Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(facts))
"""
FABRIC = """
import json, os, sys
from pathlib import Path
import ds_numa
from lightning.fabric import Fabric
early = ds_numa.bind(devices=None)  # on the way to launch(), in the first process and in those that it starts
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
report = ds_numa.bind(num_local_procs=2, devices=None)
facts = {"rank": report.local_rank, "cpus": report.cpus, "real": sorted(os.sched_getaffinity(0)), "text": str(report)}
Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(facts | {"early": str(early)}))
"""


def launch(folder: Path, *command: str, script: str = SCRIPT, **env: str) -> list[dict[str, Any]]:
    """Run a script under a launcher; what its processes found, by rank."""
    path, out = folder / "script.py", folder / "out"
    path.write_text(script)
    out.mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [*command, str(path), str(out)], env=clean | env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(file.read_text()) for file in out.iterdir()]
    return sorted(found, key=lambda facts: facts["rank"])


def program(name: str) -> str:
    """The path of a launcher; skips the test where it is not installed."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def check_halves(found: list[dict[str, Any]]) -> None:
    """Two ranks with halves of this machine's CPUs, as the kernel has them."""
    assert [facts["rank"] for facts in found] == [0, 1], found
    assert all(facts["cpus"] == facts["real"] for facts in found), found
    halves = [set(facts["cpus"]) for facts in found]
    assert halves[0] | halves[1] == set(CPUS)
    assert not halves[0] & halves[1]
    assert all("refused" not in facts["text"] for facts in found), found


def open_mpi() -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [program("mpirun.openmpi"), *root, "--oversubscribe", "-np", "2"]


def test_torchrun(tmp_path: Path) -> None:
    found = launch(tmp_path, program("torchrun"), "--nproc-per-node", "2", "--master-port", "29731")
    check_halves(found)


def test_ds_numa_run_under_torchrun(tmp_path: Path) -> None:
    command = [program("torchrun"), "--nproc-per-node", "2", "--master-port", "29732", "--no-python"]
    found = launch(tmp_path, *command, program("ds-numa"), "run", "--", sys.executable)
    check_halves(found)
    assert all("it was bound before" in facts["text"] for facts in found)


def test_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    place = [f"--world_info={world}", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=29733"]
    command = [sys.executable, "-m", "deepspeed.launcher.launch", *place, "--no_local_rank"]
    check_halves(launch(tmp_path, *command, DS_ACCELERATOR="cpu"))


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    size = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "29734"]
    rest = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    check_halves(launch(tmp_path, sys.executable, "-m", "accelerate.commands.launch", *size, *rest))


@pytest.mark.parametrize("bind", ["none", "core"])
def test_open_mpi(tmp_path: Path, bind: str) -> None:
    found = launch(tmp_path, *open_mpi(), "--bind-to", bind, sys.executable)
    if bind == "none":
        check_halves(found)
    else:
        check_kept(found, "bound already by Open MPI")


@pytest.mark.parametrize("bind", ["none", "core"])
def test_hydra(tmp_path: Path, bind: str) -> None:
    command = [program("mpirun.mpich"), "-np", "2", *(["-bind-to", bind] if bind != "none" else []), sys.executable]
    found = launch(tmp_path, *command)
    if bind == "none":
        check_halves(found)
    else:
        check_kept(found, "bound already by MPICH")


def check_kept(found: list[dict[str, Any]], words: str) -> None:
    """Each rank keeps the core that its launcher gave it."""
    assert [facts["rank"] for facts in found] == [0, 1]
    assert all(facts["cpus"] == facts["real"] and words in facts["text"] for facts in found), found
    assert not set(found[0]["cpus"]) & set(found[1]["cpus"])


def test_a_wrapper_may_bind_each_rank(tmp_path: Path) -> None:
    """As DeepSpeed's --bind_cores_to_rank does, by a numactl in front of each rank."""
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(f'#!/bin/sh\nset -- "$@"\nexec {program("taskset")} -c $((LOCAL_RANK + {CPUS[0]})) "$@"\n')
    wrapper.chmod(0o755)
    command = [program("torchrun"), "--nproc-per-node", "2", "--master-port", "29735", "--no-python", str(wrapper)]
    found = launch(tmp_path, *command, sys.executable)
    assert [facts["real"] for facts in found] == [[CPUS[0]], [CPUS[0] + 1]]
    assert all("bound already by the launcher that set LOCAL_RANK" in facts["text"] for facts in found)


def test_fabric(tmp_path: Path) -> None:
    """Its first process starts the others and names no number of them; with the number all of them are bound."""
    pytest.importorskip("lightning.fabric")
    found = launch(tmp_path, sys.executable, script=FABRIC)
    check_halves(found)
    assert "nothing to bind" in found[0]["early"]
    assert "not bound" in found[1]["early"]
    assert "Lightning does not say how many ranks this machine has" in found[1]["early"]

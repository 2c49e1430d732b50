"""``ds-numa run`` around real launchers, and ``ds-numa doctor`` beside their running jobs."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
DS_NUMA = [sys.executable, "-m", "ds_numa"]
SCRIPT = """
import os, sys
torch_came_later = "torch" not in sys.modules
line = dict(rank=os.environ["LOCAL_RANK"], cpus=sorted(os.sched_getaffinity(0)), first=torch_came_later)
print("SAID", __import__("json").dumps(line | dict(extra=os.environ.get("EXTRA"))), flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher or an earlier run left in it."""
    left_out = ("LOCAL_", "RANK", "WORLD_SIZE", "DS_NUMA", "OMPI_", "SLURM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | more


def halves() -> list[list[int]]:
    """What a plan for two ranks gives here, from `ds-numa plan` in a process of its own."""
    done = subprocess.run(
        [*DS_NUMA, "plan", "--ranks", "2", "--json"], env=environment(), capture_output=True, text=True, timeout=60
    )
    from ds_numa import parse_range_list

    return [parse_range_list(binding["cpus"]) for binding in json.loads(done.stdout)["bindings"]]


def said(out: str) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line.partition("SAID ")[2]) for line in out.splitlines() if "SAID " in line]
    return {int(line["rank"]): line for line in lines}


def test_every_rank_of_torchrun_binds_itself(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    other = tmp_path / "site"  # the user's own, which must still be loaded
    other.mkdir()
    (other / "sitecustomize.py").write_text("import os\nos.environ['EXTRA'] = 'loaded'\n")
    done = subprocess.run(
        [*DS_NUMA, "run", "--ranks", "2", "--json", "--set-omp", "--", *TORCHRUN, str(script)],
        env=environment(PYTHONPATH=os.pathsep.join([str(other), os.environ.get("PYTHONPATH", "")])),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    lines = said(done.stdout)
    assert [lines[rank]["cpus"] for rank in (0, 1)] == halves()
    assert [(lines[rank]["first"], lines[rank]["extra"]) for rank in (0, 1)] == [(True, "loaded")] * 2
    reports = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"local_rank"')]
    assert sorted(report["local_rank"] for report in reports) == [0, 1]


@pytest.mark.parametrize("wrapper", [["env", "X=1"], ["bash", "-c"], ["sh", "./start.sh"], [*DS_NUMA, "run", "--"]])
def test_a_launcher_behind_a_wrapper_is_still_a_launcher(wrapper: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [*wrapper, *TORCHRUN, "train.py"]
    if wrapper[0] == "bash":
        command = [*wrapper, shlex.join([*TORCHRUN, "train.py"])]
    elif wrapper[0] == "sh":
        (tmp_path / "start.sh").write_text(shlex.join([*TORCHRUN, "train.py"]) + "\n")
        command = wrapper
    done = subprocess.run(
        [*DS_NUMA, "run", "--", *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [said(done.stdout)[rank]["cpus"] for rank in (0, 1)] == halves()
    assert done.stderr.count("bound to CPUs") == 2
    assert "Error in sitecustomize" not in done.stderr
    assert ("is taken for a launcher" in done.stderr) == (wrapper[0] == "sh")


def test_workers_of_a_data_loader_are_not_bound_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, torch\n"
        "from torch.utils.data import DataLoader\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i):\n"
        "        return torch.tensor([*sorted(os.sched_getaffinity(0)), int('ds_numa' in sys.modules)])\n"
        "if __name__ == '__main__':\n"
        "    loader = DataLoader(Data(), num_workers=2, multiprocessing_context='spawn')\n"
        "    line = dict(rank=os.environ['LOCAL_RANK'], items=[item[0].tolist() for item in loader])\n"
        "    print('SAID', __import__('json').dumps(line), flush=True)\n"
    )
    done = subprocess.run(
        [*DS_NUMA, "run", "--", *TORCHRUN, str(script)], env=environment(), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert [said(done.stdout)[rank]["items"] for rank in (0, 1)] == [[[*half, 0]] * 2 for half in halves()]
    assert done.stderr.count("ds-numa: local rank") == 2


def test_a_number_of_ranks_that_is_not_the_launchers_is_said(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [*DS_NUMA, "run", "--ranks", "4", "--", *TORCHRUN, str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("started 2 ranks here, but --ranks is 4") == 2
    assert all(line["cpus"] == sorted(os.sched_getaffinity(0)) for line in said(done.stdout).values())


def test_strict_ends_the_job_before_a_rank_starts(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    far = max(os.sched_getaffinity(0)) + 1000
    done = subprocess.run(
        [*DS_NUMA, "run", "--ranks", "2", "--strict", "--cores", f"{far}", "--", *TORCHRUN, str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    assert said(done.stdout) == {}
    assert f"CPUs {far} are not online here" in done.stderr


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI (apt-get install openmpi-bin)")
def test_every_rank_of_mpirun_binds_itself(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"))
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    done = subprocess.run(
        [*DS_NUMA, "run", "--", *mpirun, sys.executable, str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert [line["cpus"] for _, line in sorted(said(done.stdout).items())] == halves()


@contextmanager
def running(tmp_path: Path, *prefix: str, first: str = "", launcher: Sequence[str] = TORCHRUN) -> Iterator[int]:
    """A job of torchrun whose two ranks are up, and the process of its launcher."""
    script = tmp_path / "rank.py"
    script.write_text(
        f"{first}\nimport os, time\nheld = bytearray(96 << 20)\n"
        f"open(os.path.join({str(tmp_path)!r}, 'up' + os.environ['LOCAL_RANK']), 'w').close()\ntime.sleep(120)\n"
    )
    process = subprocess.Popen(
        [*prefix, *launcher, str(script)],
        env=environment(DS_ACCELERATOR="cpu"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"up{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None, "the job ended"
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.1)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DS_NUMA, "doctor", *arguments], env=environment(), capture_output=True, text=True, timeout=120
    )


def test_the_doctor_finds_a_bound_job_well(tmp_path: Path) -> None:
    with running(tmp_path, *DS_NUMA, "run", "--quiet", "--") as pid:
        done = doctor("--pid", str(pid), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = json.loads(done.stdout)["jobs"]
    assert (job["ok"], job["launcher_pid"], [rank["local_rank"] for rank in job["ranks"]]) == (True, pid, [0, 1])
    assert [rank["cpus"] for rank in job["ranks"]] == [rank["planned"] for rank in job["ranks"]]
    assert all(sum(rank["memory"].values()) > 96 << 20 for rank in job["ranks"] if rank["memory"] is not None)


# A rank that starts a worker with more memory than its own, and writes its own process number down.
WORKER = """
import os, subprocess, sys
code = "held = bytearray(400 << 20); print(1, flush=True); import time; time.sleep(100)"
worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
worker.stdout.readline()
open(os.path.join(os.path.dirname(__file__), "pid" + os.environ["LOCAL_RANK"]), "w").write(str(os.getpid()))
"""


def test_the_doctor_judges_the_rank_and_neither_its_worker_nor_its_shell(tmp_path: Path) -> None:
    (tmp_path / "wrap.sh").write_text('"$@"\nexit $?\n')
    launcher = [*TORCHRUN, "--no-python", "bash", str(tmp_path / "wrap.sh"), sys.executable]
    with running(tmp_path, first=WORKER, launcher=launcher) as pid:
        done = doctor("--pid", str(pid), "--json")
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    (job,) = json.loads(done.stdout)["jobs"]
    assert [rank["pid"] for rank in job["ranks"]] == pids


def test_the_doctor_names_a_rank_that_has_ended(tmp_path: Path) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    launcher += ["--master_addr=127.0.0.1", "--master_port=29717"]
    with running(tmp_path, *DS_NUMA, "run", "--quiet", "--", launcher=launcher) as pid:
        job = json.loads(doctor("--pid", str(pid), "--json").stdout)["jobs"][0]
        assert (job["ok"], [rank["bound_by"] for rank in job["ranks"]]) == (True, ["bound by ds-numa run"] * 2)
        os.kill(pid, signal.SIGSTOP)  # so that it does not end the other rank
        os.kill(job["ranks"][1]["pid"], signal.SIGKILL)
        done = doctor("--pid", str(pid))
    assert done.returncode == 1
    assert "rank 1: OFF: no process of it is seen" in done.stdout
    assert "rank 0 (process" in done.stdout
    assert done.stderr == ""


def test_the_doctor_says_which_launcher_cut(tmp_path: Path) -> None:
    one = str(min(os.sched_getaffinity(0)))
    with running(tmp_path, "taskset", "-c", one) as pid:
        done = doctor("--pid", str(pid))
    assert done.returncode == 1
    assert f"the launcher itself may use CPUs {one} of " in done.stdout
    assert done.stdout.count("OFF: it is not bound") == 2


def test_the_doctor_names_ranks_that_nobody_bound(tmp_path: Path) -> None:
    with running(tmp_path) as pid:
        done = doctor("--pid", str(pid))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("OFF: it is not bound: it may use all of the") == 2
    assert "2 of 2 off" in done.stdout


def test_the_doctor_names_a_rank_that_sits_on_anothers_cpus(tmp_path: Path) -> None:
    with running(tmp_path, *DS_NUMA, "run", "--quiet", "--") as pid:
        before = json.loads(doctor("--pid", str(pid), "--json").stdout)["jobs"][0]["ranks"]
        cpus = os.sched_getaffinity(before[0]["pid"])
        for thread in os.listdir(f"/proc/{before[1]['pid']}/task"):
            os.sched_setaffinity(int(thread), cpus)
        done = doctor("--pid", str(before[1]["pid"]))
    assert done.returncode == 1
    assert "with rank 0" in done.stdout
    assert "with rank 1" in done.stdout or "1 of 2 off" in done.stdout


def test_the_doctor_measures_this_machine() -> None:
    done = doctor("--measure", "--json")
    found = json.loads(done.stdout)["measured"]
    assert found["copy"], done.stderr
    for row in found["copy"].values():
        assert all(0.1 < rate < 10_000 for rate in row.values())

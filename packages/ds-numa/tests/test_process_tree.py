from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ds_numa._cgroup import read_group_cpus
from ds_numa._files import Tree
from ds_numa._process_tree import find_launcher

Put = Callable[..., None]
RANK = {"HOME": "/", "LOCAL_RANK": "1"}


def test_the_nearest_process_without_the_variable_launched_this_one(tmp_path: Path, put_process: Put) -> None:
    put_process(9, 8, "0-3", RANK)
    put_process(8, 7, "0-3", RANK)  # a wrapper of this rank
    put_process(7, 1, "0-7", {"CUDA_VISIBLE_DEVICES": "3"})
    put_process(1, 0, "0-15", {})
    found = find_launcher(tmp_path, ["LOCAL_RANK"], 9)
    assert found == (7, tuple(range(8)), {"CUDA_VISIBLE_DEVICES": "3"})


def test_a_process_of_somebody_else_is_the_launcher(tmp_path: Path, put_process: Put) -> None:
    put_process(9, 7, "0-3", RANK)
    put_process(7, 1, "0-7", None)
    assert find_launcher(tmp_path, ["LOCAL_RANK"], 9) == (7, tuple(range(8)), None)


@pytest.mark.parametrize("own", [{}, None])
def test_a_rank_that_was_set_after_the_start_tells_nothing(
    tmp_path: Path, put_process: Put, own: dict[str, str] | None
) -> None:
    put_process(9, 7, "0-3", own)
    put_process(7, 1, "0-7", {})
    assert find_launcher(tmp_path, ["LOCAL_RANK"], 9) is None


def test_the_end_of_a_containers_processes(tmp_path: Path, put_process: Put) -> None:
    put_process(9, 1, "0-3", RANK)
    put_process(1, 0, "0-3", RANK)
    assert find_launcher(tmp_path, ["LOCAL_RANK"], 9) is None


def test_a_circle_ends(tmp_path: Path, put_process: Put) -> None:
    put_process(9, 8, "0-3", RANK)
    put_process(8, 9, "0-3", RANK)
    assert find_launcher(tmp_path, ["LOCAL_RANK"], 9) is None


def test_a_mask_that_cannot_be_read(tmp_path: Path, put_process: Put) -> None:
    put_process(9, 7, "0-3", RANK)
    put_process(7, 1, "what?", {})
    assert find_launcher(tmp_path, ["LOCAL_RANK"], 9) == (7, None, {})


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/cpuset.cpus.effective": "0-3"}, (0, 1, 2, 3)),
        ("0::/host/path\n", {"cpuset.cpus.effective": "4-5"}, (4, 5)),  # inside a container
        ("3:cpuset:/job\n2:cpu,cpuacct:/x\n0::/\n", {"cpuset/job/cpuset.cpus": "1,3"}, (1, 3)),
        ("3:cpuset:/job\n", {"cpuset/job/cpuset.effective_cpus": "1", "cpuset/job/cpuset.cpus": "0-2"}, (0, 1, 2)),
        ("0::/\n", {"cpuset.cpus.effective": ""}, None),
        ("0::/\n", {"cpuset.cpus.effective": "nonsense"}, None),
        ("", {}, None),
    ],
)
def test_the_cpuset(tmp_path: Path, cgroup: str, files: dict[str, str], expected: tuple[int, ...] | None) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert read_group_cpus(Tree(tmp_path)) == expected


CHAIN = """
import os, subprocess, sys
from pathlib import Path
from ds_numa._process_tree import find_launcher
if sys.argv[1] == "launcher":
    rank = os.environ | {"LOCAL_RANK": "1"}
    subprocess.run([sys.executable, "-c", sys.argv[2], "wrapper", sys.argv[2]], env=rank, timeout=50)
    print(os.getpid(), sorted(os.sched_getaffinity(0)))
elif sys.argv[1] == "wrapper":
    subprocess.run([sys.executable, "-c", sys.argv[2], "rank"], timeout=40)
else:
    found = find_launcher(Path("/"), ["LOCAL_RANK"])
    print(found.pid, list(found.cpus), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
def test_real_processes() -> None:
    done = subprocess.run([sys.executable, "-c", CHAIN, "launcher", CHAIN], capture_output=True, text=True, timeout=60)
    found, real = done.stdout.splitlines()
    assert found == real

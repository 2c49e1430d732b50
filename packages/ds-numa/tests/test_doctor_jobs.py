from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ds_numa import Topology
from ds_numa._doctor import command, examine as examine_module
from ds_numa._doctor.examine import Placement, examine
from ds_numa._doctor.jobs import _main_process, _Seen, find_jobs
from ds_numa.errors import RankError

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")

# A launcher that starts two ranks, of which rank 1 has a worker with the same environment, and says their numbers.
LAUNCHER = """
import os, subprocess, sys, time
rank = "import os, subprocess, sys, time; "
worker = "[subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']) for _ in '1' * {workers}]; "
more = "held = bytearray(64 << 20); print('up', flush=True); time.sleep(60)"
ranks = []
for i in range(2):
    env = dict(os.environ, LOCAL_RANK=str(i), LOCAL_WORLD_SIZE="2", RANK=str(i), WORLD_SIZE="2")
    code = rank + worker.format(workers=i) + more
    ranks.append(subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE))
for process in ranks:
    process.stdout.readline()
print(*(process.pid for process in ranks), flush=True)
time.sleep(60)
"""


@pytest.fixture
def job() -> Iterator[tuple[int, list[int]]]:
    """The process numbers of a launcher and of its two ranks."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert launcher.stdout is not None
    try:
        yield launcher.pid, [int(word) for word in launcher.stdout.readline().split()]
    finally:
        os.killpg(launcher.pid, 9)
        launcher.wait(timeout=30)
        launcher.stdout.close()


def test_a_running_job_is_found_by_its_launcher_a_rank_or_a_worker(job: tuple[int, list[int]]) -> None:
    launcher, ranks = job
    for pid in (launcher, *ranks):
        (found,) = find_jobs([pid])
        assert found.launcher_pid == launcher
        assert [(rank.local_rank, rank.pid) for rank in found.ranks] == list(enumerate(ranks))
    assert launcher in [found.launcher_pid for found in find_jobs()]


def test_a_rank_is_examined_as_linux_shows_it(job: tuple[int, list[int]]) -> None:
    launcher, ranks = job
    cpu = min(os.sched_getaffinity(ranks[0]))
    os.sched_setaffinity(ranks[0], {cpu})
    here = examine(ranks[0], launcher)
    assert (here.cpus, here.threads, here.stray_threads) == ((cpu,), 1, {})
    assert here.parent_cpus == tuple(sorted(os.sched_getaffinity(launcher)))
    if here.memory is not None:  # some sandboxes have no numa_maps
        assert sum(here.memory.values()) >= 64 << 20


def rank_process(pid: int, parent: int, megabytes: int) -> _Seen:
    return _Seen(pid, parent, "torchrun", 0, 2, {}, "", megabytes << 20)


@pytest.mark.parametrize(
    ("processes", "main"),
    [
        ([rank_process(10, 1, 400), rank_process(11, 10, 900)], 10),  # a worker with more memory
        ([rank_process(10, 1, 3), rank_process(11, 10, 400), rank_process(12, 11, 900)], 11),  # a shell in front
        ([rank_process(10, 1, 3), rank_process(11, 10, 1), rank_process(12, 10, 1), rank_process(13, 12, 90)], 13),
        ([rank_process(10, 1, 3)], 10),
        ([rank_process(10, 1, 300), rank_process(20, 1, 500)], 20),  # its parent ended
    ],
)
def test_the_main_process_of_a_rank_is_no_worker_and_no_wrapper(processes: list[_Seen], main: int) -> None:
    assert _main_process(processes).pid == main
    assert _main_process(processes[::-1]).pid == main


def test_a_rank_that_ended_is_missing(job: tuple[int, list[int]]) -> None:
    launcher, ranks = job
    os.kill(ranks[1], 9)
    subprocess.run(["pkill", "-9", "-P", str(ranks[1])], check=False)
    (found,) = find_jobs([launcher])
    assert ([rank.pid for rank in found.ranks], found.size, found.missing) == ([ranks[0]], 2, (1,))


@pytest.mark.parametrize("as_json", [True, False])
def test_a_rank_that_ends_while_it_is_looked_at_leaves_the_others(
    job: tuple[int, list[int]], as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher, ranks = job

    def look(pid: int, launcher_pid: int | None) -> Placement:
        if pid == ranks[0]:
            raise RankError("it ended")
        return examine(pid, launcher_pid)

    monkeypatch.setattr(command, "examine", look)
    assert command.doctor(Topology.here(), [launcher], "auto", measured=False, as_json=as_json) == 1
    out = capsys.readouterr().out
    if as_json:
        (found,) = json.loads(out)["jobs"]
        assert [rank["pid"] for rank in found["ranks"]] == [None, ranks[1]]
    else:
        assert "rank 0: OFF: no process of it is seen" in out
        assert f"rank 1 (process {ranks[1]}): " in out


def test_no_job_at_all_is_1_and_still_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "find_jobs", lambda pids: [])
    assert command.doctor(Topology.here(), [], "auto", measured=False, as_json=True) == 1
    written = capsys.readouterr()
    assert json.loads(written.out) == {"jobs": []}
    assert "no rank of any launcher" in written.err
    with pytest.raises(RankError, match="no rank of any launcher"):
        command.doctor(Topology.here(), [], "auto", measured=False, as_json=False)


def test_jobs_on_the_same_cpus_are_said(
    job: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = find_jobs([job[0]])
    twice = [found, replace(found, launcher_pid=os.getpid())]
    monkeypatch.setattr(command, "find_jobs", lambda pids: twice)
    command.doctor(Topology.here(), [], "auto", measured=False, as_json=True)
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert f"1 other job (process {os.getpid()}) may use CPUs" in jobs[0]["notes"][-1]
    assert f"1 other job (process {job[0]}) may use CPUs" in jobs[1]["notes"][-1]


def test_masks_and_threads_are_read_below_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(path: str, state: str, cpus: str) -> None:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "status").write_text(f"Name:\tx\nState:\t{state}\nCpus_allowed_list:\t{cpus}\n")

    put("7", "S (sleeping)", "0-3,900")
    put("7/task/7", "S (sleeping)", "0-3,900")
    put("7/task/8", "S (sleeping)", "4")
    put("7/task/9", "R (running)", "1")
    put("8", "Z (zombie)", "0-3")
    put("8/task/8", "Z (zombie)", "0-3")
    put("9", "S (sleeping)", "0-7")
    (tmp_path / "7/numa_maps").write_text(
        "5500 prefer:1 anon=4 N0=1 N1=3 kernelpagesize_kB=4\n7f00 default file=/lib/x.so mapped=9 N0=9\n"
    )
    monkeypatch.setattr(examine_module, "_PROC", tmp_path)
    expected = Placement((0, 1, 2, 3, 900), 3, {(4,): 1}, {0: 4096, 1: 3 * 4096}, "prefer:1", (0, 1, 2, 3, 4, 5, 6, 7))
    assert examine(7, 9) == expected
    for pid in (8, 99):
        with pytest.raises(RankError, match=f"process {pid} has ended"):
            examine(pid, None)


def test_a_process_without_ranks_is_a_job_of_its_own() -> None:
    code = "print('up', flush=True); import time; time.sleep(60)"
    env = {name: value for name, value in os.environ.items() if "RANK" not in name}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (found,) = find_jobs([process.pid])
        process.kill()
    assert (found.launcher, [rank.pid for rank in found.ranks]) == ("none", [process.pid])
    with pytest.raises(RankError, match=f"--pid {process.pid}: there is no such process"):
        find_jobs([process.pid])
    with pytest.raises(RankError, match="has ended"):
        examine(process.pid, None)

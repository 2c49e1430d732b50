from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from ds_numa._doctor.examine import examine
from ds_numa._doctor.jobs import find_jobs
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
    with pytest.raises(RankError, match="cannot be looked at"):
        examine(process.pid, None)

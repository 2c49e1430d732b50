from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ds_numa
import pytest
from ds_numa import Binding, BindReport, Topology, apply, bind, binding, plan_binding
from ds_numa.errors import RankError

BOX = Topology.from_dict(
    {
        "nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}},
        "gpus": [{"pci": f"0000:1{i}:00.0", "node": 1 - i, "uuid": f"GPU-{i}"} for i in range(2)],
    }
)
needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)


class Stage:
    """A process on `BOX` whose mask and memory policy are written down instead of set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mask, self.policy = list(range(8)), None
        self.refuse_cpus: OSError | None = None
        self.refuse_memory: OSError | None = None
        monkeypatch.setattr(binding, "read_mask", lambda: list(self.mask))
        monkeypatch.setattr(binding, "set_mask", self._set_mask)
        monkeypatch.setattr(binding, "set_memory_policy", self._set_policy)
        monkeypatch.setattr(Topology, "here", classmethod(lambda cls: BOX))

    def _set_mask(self, cpus: Any) -> None:
        if self.refuse_cpus:
            raise self.refuse_cpus
        self.mask = list(cpus)

    def _set_policy(self, mode: str, nodes: Any) -> None:
        if self.refuse_memory:
            raise self.refuse_memory
        self.policy = (mode, tuple(nodes))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(binding.MARK, "")  # so that what a test sets is taken back
    return Stage(monkeypatch)


def test_cpus_and_memory_are_bound(stage: Stage) -> None:
    report = apply(plan_binding(BOX, 2, memory="bind"), 1)
    assert (stage.mask, stage.policy) == ([4, 5, 6, 7], ("bind", (1,)))
    assert report.complete
    assert str(report) == "local rank 1: bound to CPUs 4-7; memory: bind node 1"


def test_a_single_binding_needs_no_rank(stage: Stage) -> None:
    assert apply(plan_binding(BOX, 2)[0]).cpus == (0, 1, 2, 3)
    assert stage.policy == ("prefer", (0,))


def test_refused_memory_keeps_the_cpus(stage: Stage) -> None:
    stage.refuse_memory = OSError(errno.EPERM, "Operation not permitted")
    report = apply(plan_binding(BOX, 2), 0)
    assert stage.mask == [0, 1, 2, 3]
    assert (report.cpus_bound, report.memory_bound, report.complete) == (True, False, False)
    for words in ("bound to CPUs 0-3", "refused: memory policy prefer node 0 (EPERM", "CAP_SYS_NICE"):
        assert words in str(report)


def test_refused_cpus_leave_everything_alone(stage: Stage) -> None:
    stage.refuse_cpus = OSError(errno.EINVAL, "Invalid argument")
    report = apply(plan_binding(BOX, 2), 0)
    assert (stage.mask, stage.policy) == (list(range(8)), None)
    assert report.cpus == tuple(range(8))
    assert str(report).startswith("local rank 0: not bound, running on CPUs 0-7; refused: CPUs 0-3 (EINVAL")


def test_nothing_to_bind_is_said_plainly(stage: Stage) -> None:
    stage.refuse_cpus = stage.refuse_memory = OSError(errno.EPERM, "nobody should try")
    report = apply(plan_binding(BOX, 1), 0)
    assert report.complete
    assert str(report) == "local rank 0: nothing to bind, running on CPUs 0-7"


def test_omp_is_set_when_asked_for_and_only_then(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun sets it
    apply(plan_binding(BOX, 2), 0)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    report = apply(plan_binding(BOX, 2), 0, set_omp=True)
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS = 4 was set" in str(report)


@pytest.mark.parametrize("name", ["KMP_AFFINITY", "GOMP_CPU_AFFINITY"])
def test_another_pinning_library_is_mentioned(stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0-1")
    assert f"{name} is set" in str(apply(plan_binding(BOX, 2), 0))


def test_a_plan_has_no_such_rank(stage: Stage) -> None:
    with pytest.raises(RankError, match="local_rank = 2 must lie in"):
        apply(plan_binding(BOX, 2), 2)
    with pytest.raises(RankError, match="local_rank is not"):
        apply(plan_binding(BOX, 2))
    assert stage.mask == list(range(8))


def test_bind_reads_the_launcher(stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with caplog.at_level(logging.INFO, "ds.numa"):
        report = bind()
    assert report.cpus == (2, 3) == tuple(stage.mask)
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", str(report))]


def test_binding_twice_does_not_halve_the_share(stage: Stage) -> None:
    first = bind(1, 2)
    assert bind(1, 2).cpus == first.cpus == (4, 5, 6, 7) == tuple(stage.mask)
    assert "it was bound before" in str(bind(1, 2))


def test_a_refused_binding_may_be_tried_again(stage: Stage) -> None:
    stage.refuse_cpus = OSError(errno.EINVAL, "Invalid argument")
    assert not bind(1, 2).complete
    stage.refuse_cpus = None
    assert bind(1, 2).cpus == (4, 5, 6, 7) == tuple(stage.mask)


def test_too_many_ranks_do_not_stop_training(stage: Stage, caplog: Any) -> None:
    report = bind(0, 9)
    assert stage.mask == list(range(8))
    assert "9 ranks need 9 CPUs, but 8 may be used" in str(report)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), (True, 2)])
def test_bad_ranks(stage: Stage, rank: int, ranks: int) -> None:
    with pytest.raises(RankError):
        bind(rank, ranks)
    assert stage.mask == list(range(8))


def test_ranks_follow_cudas_gpus(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    report = bind(0, 2)  # cuda:0 hangs on node 1
    assert (report.cpus, report.binding.gpu if report.binding else None) == ((4, 5, 6, 7), "0000:10:00.0")


def test_gpus_are_left_out_with_a_reason(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as with one GPU per task
    report = bind(0, 2)
    assert report.cpus == (0, 1, 2, 3)
    assert "GPUs are left out: 2 ranks see 1" in str(report)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-9,GPU-8")
    assert "GPUs are left out: CUDA_VISIBLE_DEVICES has 'GPU-9'" in str(bind(1, 2))


def test_gpus_may_be_given_or_turned_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert bind(0, 2, gpus=None).cpus == (0, 1, 2, 3)
    stage.mask = list(range(8))
    assert bind(1, 2, gpus=["0000:11:00.0", "0000:10:00.0"]).cpus == (4, 5, 6, 7)


def test_a_report_is_plain_data() -> None:
    assert BindReport(0, (0,)) == BindReport(0, (0,))
    assert ds_numa.BindReport is BindReport


REAL = """
import os, threading
import ds_numa
stop = threading.Event()
worker = threading.Thread(target=stop.wait); worker.start()
before = sorted(os.sched_getaffinity(0))
report = ds_numa.bind(1, 2)
print(before, sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(worker.native_id)), report.complete)
stop.set()
"""


@needs_two
def test_this_very_process_can_be_bound() -> None:
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True, timeout=60)
    before, now, worker, complete = (eval(part) for part in done.stdout.replace("] ", "]|").strip().split("|"))
    plan = plan_binding(Topology.here(), 2)
    assert now == worker == list(plan[1].cpus)
    assert set(now) < set(before)
    assert complete is True


SOFT = """
import os, ds_numa
cpus = sorted(os.sched_getaffinity(0))[-1:]
report = ds_numa.apply(ds_numa.Binding(0, tuple(cpus), 1, (0,), "bind", (0,)))
print(report, "|", sorted(os.sched_getaffinity(0)) == cpus)
"""


@needs_two
def test_a_container_that_refuses_memory_policy_still_binds_cpus() -> None:
    tool = Path(__file__).with_name("refusing.py")
    done = subprocess.run([sys.executable, str(tool), SOFT], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("no seccomp filter can be set here")
    assert done.returncode == 0, done.stderr
    report, bound = done.stdout.strip().split(" | ")
    assert bound == "True"
    assert "refused: memory policy bind node 0 (EPERM" in report


def test_bindings_can_be_written_by_hand() -> None:
    assert str(Binding(0, (0, 1), 2, (0,))) == "CPUs 0-1 (2 cores, node 0)"

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ds_numa
import pytest
from ds_numa import Binding, BindReport, Topology, apply, bind, binding, plan_binding
from ds_numa.errors import BindingError, PlanError, RankError, TopologyError

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
        self.mask: list[int] = list(range(8))
        self.policy: tuple[str, tuple[int, ...]] = ("none", ())
        self.online = set(range(8))  # the kernel drops other CPUs from a mask without an error
        self.kernel_nodes = {0, 1}  # and other nodes from a policy
        self.box = BOX
        self.refuse_cpus: OSError | None = None
        self.refuse_memory: dict[tuple[str, int], OSError] = {}  # by mode and number of nodes
        self.refuse_reading: OSError | None = None
        monkeypatch.setattr(binding, "read_mask", lambda: list(self.mask))
        monkeypatch.setattr(binding, "set_mask", self._set_mask)
        monkeypatch.setattr(binding, "set_memory_policy", self._set_policy)
        monkeypatch.setattr(binding, "read_memory_policy", self._read_policy)
        monkeypatch.setattr(Topology, "here", classmethod(lambda cls: self.box))

    def _set_mask(self, cpus: Any) -> None:
        if self.refuse_cpus:
            raise self.refuse_cpus
        self.mask = sorted(self.online.intersection(cpus))

    def _set_policy(self, mode: str, nodes: Any) -> None:
        if (mode, len(nodes)) in self.refuse_memory:
            raise self.refuse_memory[mode, len(nodes)]
        self.policy = (mode, tuple(node for node in nodes if node in self.kernel_nodes))

    def _read_policy(self) -> tuple[str, tuple[int, ...]]:
        if self.refuse_reading:
            raise self.refuse_reading
        return self.policy


EPERM = OSError(errno.EPERM, "Operation not permitted")
EINVAL = OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(binding.MARK, "")  # so that what a test sets is taken back
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "numpy", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "numpy")
    return Stage(monkeypatch)


def test_cpus_and_memory_are_bound(stage: Stage) -> None:
    report = apply(plan_binding(BOX, 2, devices=None, memory="bind"), 1)
    assert (stage.mask, stage.policy) == ([4, 5, 6, 7], ("bind", (1,)))
    assert report.complete
    assert str(report) == "local rank 1: bound to CPUs 4-7; memory: bind node 1"


def test_a_single_binding_needs_no_rank(stage: Stage) -> None:
    assert apply(plan_binding(BOX, 2, devices=None)[0]).cpus == (0, 1, 2, 3)
    assert stage.policy == ("preferred", (0,))


def test_refused_memory_keeps_the_cpus(stage: Stage) -> None:
    stage.refuse_memory = {("preferred", 1): EPERM}
    report = apply(plan_binding(BOX, 2, devices=None), 0)
    assert stage.mask == [0, 1, 2, 3]
    assert (report.cpus_bound, report.memory_bound, report.complete) == (True, False, False)
    assert (report.memory, report.memory_nodes) == (None, ())
    for words in ("bound to CPUs 0-3", "refused: memory policy preferred node 0 (EPERM", "CAP_SYS_NICE"):
        assert words in str(report)


@pytest.mark.parametrize(
    ("mode", "nodes", "refuse", "in_force", "said"),
    [
        ("bind", (0,), [("bind", 1)], ("preferred", (0,)), ["bind node 0 (EPERM"]),
        ("bind", (0,), [("bind", 1), ("preferred", 1)], ("none", ()), ["bind node 0 (E", "preferred node 0 (E"]),
        (
            "bind",
            (0, 1),
            [("bind", 2), ("preferred", 2)],
            ("preferred", (0,)),
            ["bind nodes 0-1", "preferred nodes 0-1"],
        ),
        ("preferred", (0, 1), [("preferred", 2)], ("preferred", (0,)), ["preferred nodes 0-1 (EPERM"]),
        ("interleave", (0, 1), [], ("interleave", (0, 1)), []),
        ("interleave", (0, 1), [("interleave", 2)], ("none", ()), ["interleave nodes 0-1 (EPERM"]),
        ("prefer", (1,), [], ("preferred", (1,)), []),
    ],
)
def test_memory_is_softened_step_by_step_and_each_step_is_said(
    stage: Stage,
    mode: Any,
    nodes: tuple[int, ...],
    refuse: list[tuple[str, int]],
    in_force: tuple[str, tuple[int, ...]],
    said: list[str],
) -> None:
    stage.refuse_memory = dict.fromkeys(refuse, EPERM)
    report = apply(Binding(0, (0, 1), 2, (0,), mode, nodes))
    assert stage.policy == in_force == (report.memory or "none", report.memory_nodes)
    assert len(report.refused) == len(said)
    assert all(words in refusal for words, refusal in zip(said, report.refused, strict=True))
    if report.memory and said:
        assert f"so it is {in_force[0]} node 0" in report.refused[-1]


def test_cpus_that_the_kernel_drops_are_not_claimed(stage: Stage) -> None:
    stage.online = {0, 1, 2, 3, 4, 5}
    report = apply(plan_binding(BOX, 2, devices=None), 1)
    assert report.cpus == (4, 5) == tuple(stage.mask)
    assert report.refused == ("CPUs 6-7 (they are not online, or outside this process's cpuset)",)
    assert str(report).startswith("local rank 1: bound to CPUs 4-5; memory: preferred node 1; refused: CPUs 6-7")


def test_nodes_that_the_kernel_drops_are_not_claimed(stage: Stage) -> None:
    stage.kernel_nodes = {0}
    report = apply(Binding(0, (0, 1), 2, (0,), "interleave", (0, 1)))
    assert (report.memory, report.memory_nodes) == ("interleave", (0,))
    assert report.refused == ("memory policy interleave nodes 0-1 (the kernel has interleave node 0 in force)",)


def test_a_policy_that_cannot_be_read_back_is_said_to_be_so(stage: Stage) -> None:
    stage.refuse_reading = EPERM
    report = apply(plan_binding(BOX, 2, devices=None), 0)
    assert (report.memory, report.complete) == ("preferred", True)
    assert "the memory policy was set, but the system refuses to read it back" in report.notes


def test_a_policy_from_outside_is_reported(stage: Stage) -> None:
    stage.policy = ("bind", (0,))  # numactl --membind=0
    assert "memory: bind node 0" in str(apply(plan_binding(BOX, 1, devices=None), 0))


def test_a_thread_that_kept_its_mask_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    me = threading.get_native_id()
    monkeypatch.setattr(binding, "read_masks", lambda: {me: tuple(stage.mask), 7: (0, 1, 2, 3, 4, 5, 6, 7)})
    report = apply(plan_binding(BOX, 2, devices=None), 0)
    assert report.refused == ("CPUs of thread 7 (it runs on 0-7)",)
    assert "1 threads that run already keep the memory policy that they had" in report.notes


@pytest.mark.parametrize("refusal", ["CPUs", "memory", "dropped"])
def test_strict_gives_back_what_was_there(stage: Stage, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    stage.policy = ("interleave", (0, 1))
    if refusal == "CPUs":
        stage.refuse_cpus = EINVAL
    elif refusal == "memory":
        stage.refuse_memory = {("bind", 1): EPERM}  # softened to preferred, which strict does not accept
    else:
        stage.kernel_nodes = {0, 1}
        monkeypatch.setattr(binding, "read_masks", dict)
        stage.online = set(range(8)) - {5}
        stage.mask.remove(5)
    mask = list(stage.mask)
    with pytest.raises(BindingError, match="strict = True") as caught:
        apply(plan_binding(BOX, 2, devices=None, memory="bind"), 1, strict=True, set_omp=True)
    assert (stage.mask, stage.policy) == (mask, ("interleave", (0, 1)))
    assert "OMP_NUM_THREADS" not in os.environ
    assert isinstance(caught.value.report, BindReport)
    assert not caught.value.report.complete


def test_strict_says_if_it_cannot_give_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_once(cpus: Any) -> None:
        if stage.mask != list(range(8)):
            raise EPERM
        stage.mask = list(cpus)

    monkeypatch.setattr(binding, "set_mask", set_once)
    stage.refuse_memory = {("preferred", 1): EPERM}
    with pytest.raises(BindingError, match="what was bound could not be taken back"):
        apply(plan_binding(BOX, 2, devices=None), 1, strict=True)


def test_strict_accepts_what_is_granted(stage: Stage) -> None:
    assert bind(1, 2, strict=True).cpus == (4, 5, 6, 7)
    with pytest.raises(BindingError, match="9 ranks need 9 CPUs"):
        bind(0, 9, strict=True)


def test_refused_cpus_leave_everything_alone(stage: Stage) -> None:
    stage.refuse_cpus = OSError(errno.EINVAL, "Invalid argument")
    report = apply(plan_binding(BOX, 2, devices=None), 0)
    assert (stage.mask, stage.policy) == (list(range(8)), ("none", ()))
    assert report.cpus == tuple(range(8))
    assert str(report).startswith("local rank 0: not bound, running on CPUs 0-7; refused: CPUs 0-3 (EINVAL")


def test_nothing_to_bind_is_said_plainly(stage: Stage) -> None:
    stage.refuse_cpus = OSError(errno.EPERM, "nobody should try")
    stage.refuse_memory = {("preferred", 1): EPERM, ("none", 0): EPERM}
    report = apply(plan_binding(BOX, 1, devices=None), 0)
    assert report.complete
    assert str(report) == "local rank 0: nothing to bind, running on CPUs 0-7"


def test_omp_is_set_when_asked_for_and_only_then(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun sets it
    apply(plan_binding(BOX, 2, devices=None), 0)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    report = apply(plan_binding(BOX, 2, devices=None), 0, set_omp=True)
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS = 4 was set" in str(report)


@pytest.mark.parametrize("name", ["KMP_AFFINITY", "GOMP_CPU_AFFINITY"])
def test_another_pinning_library_is_mentioned(stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0-1")
    assert f"{name} = '0-1' is set" in str(apply(plan_binding(BOX, 2, devices=None), 0))


def test_a_plan_has_no_such_rank(stage: Stage) -> None:
    with pytest.raises(RankError, match="local_rank = 2 must lie in"):
        apply(plan_binding(BOX, 2, devices=None), 2)
    with pytest.raises(RankError, match="local_rank is not given"):
        apply(plan_binding(BOX, 2, devices=None))
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


@pytest.mark.parametrize(
    ("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), (True, 2), (-1, None), ("1", None), (None, 0), (None, "2")]
)
def test_bad_ranks(stage: Stage, rank: Any, ranks: Any) -> None:
    with pytest.raises(RankError):
        bind(rank, ranks)
    assert stage.mask == list(range(8))


def test_ranks_follow_cudas_gpus(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    report = bind(0, 2)  # cuda:0 hangs on node 1
    assert (report.cpus, report.binding.gpu if report.binding else None) == ((4, 5, 6, 7), "0000:10:00.0")


def test_gpus_are_left_out_with_a_reason(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    report = bind(0, 4)
    assert report.cpus == (0, 1)
    assert "GPUs are left out: 4 ranks see 2" in str(report)
    stage.mask = list(range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-9")  # no NVML here knows it
    assert "note: GPUs are left out: " in str(bind(1, 2))


@pytest.mark.parametrize(
    ("choice", "said"), [("0,0", True), ("9", True), ("", False), ("-1", False), ("NoDevFiles", False)]
)
def test_a_choice_that_shows_no_gpu_is_said_unless_it_is_on_purpose(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, choice: str, said: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", choice)
    report = bind(0, 2)
    note = f"GPUs are left out: CUDA_VISIBLE_DEVICES = {choice!r} shows none of 0000:10:00.0, 0000:11:00.0"
    assert report.cpus == (0, 1, 2, 3)
    assert report.notes.count(note) == said
    assert not any("left out" in other for other in report.notes if other != note)


def test_gpus_of_an_unknown_vendor_are_said(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    stage.box = replace(BOX, gpus=(replace(BOX.gpus[0], uuid=None, vendor=None),))
    assert "GPUs are left out: the vendor of 0000:10:00.0 is not known: pass devices=" in bind(0, 2).notes


def test_what_the_machine_does_not_tell_is_in_the_report_once(stage: Stage) -> None:
    stage.box = replace(BOX, notes=("the tree lacks a file", "the tree lacks a file"))
    assert bind(0, 2).notes.count("the tree lacks a file") == 1


def test_a_rank_that_sees_one_gpu_sits_next_to_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank, gpu in enumerate("10"):  # Ray: each rank sees its own; cuda:0 of the machine hangs on node 1
        stage.mask = list(range(8))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
        report = bind(rank, 2)
        shares.append(report.cpus)
        assert "sees one GPU" in str(report)
    assert shares == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_ranks_that_see_one_gpu_get_disjoint_shares(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on a machine of two GPUs share them in some way that no rank can see."""
    for gpus in ("0000", "0101", "1100", "0110"):
        shares: list[int] = []
        for rank, gpu in enumerate(gpus):
            stage.mask = list(range(8))
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
            shares += bind(rank, 4).cpus
        assert len(shares) == len(set(shares))


def test_parts_of_one_gpu_are_not_two_ranks_own(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-0/1/0,MIG-GPU-0/2/0")
    first = bind(0, 2).cpus
    stage.mask = list(range(8))
    assert not set(first) & set(bind(1, 2).cpus)


def test_gpus_may_be_given_or_turned_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("devices", "gpus"):
        stage.mask = list(range(8))
        assert bind(0, 2, **{name: None}).cpus == (0, 1, 2, 3)  # type: ignore[arg-type]
        stage.mask = list(range(8))
        given: Any = {name: ["0000:11:00.0", "0000:10:00.0"]}
        assert bind(1, 2, **given).cpus == (4, 5, 6, 7)
    with pytest.raises(PlanError, match="mean the same: give devices= alone"):
        bind(0, 2, devices=None, gpus=None)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"mode": "numa"}, PlanError), ({"memory": "soft"}, PlanError), ({"cores": "9-8"}, ValueError)],
)
def test_the_callers_mistakes_are_errors(stage: Stage, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        bind(0, 2, **options)
    assert stage.mask == list(range(8))


@pytest.mark.parametrize(
    "env",
    [
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"},
        {"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "2"},
        {"LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,3"},
        {"PMIX_RANK": "1"},
    ],
)
def test_the_environment_never_ends_training(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: Any, env: dict[str, str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    report = bind()
    assert stage.mask == list(range(8))
    assert "not bound, running on CPUs 0-7; refused: binding: " in str(report)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(BindingError, match="strict = True"):
        bind(strict=True)


def test_a_machine_that_cannot_be_read_does_not_end_training(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cls: type[Topology]) -> Topology:
        raise TopologyError("/sys/devices/system/cpu is not there")

    monkeypatch.setattr(Topology, "here", classmethod(fail))
    assert "refused: /sys/devices/system/cpu is not there" in str(bind(0, 2))


def by_srun(monkeypatch: pytest.MonkeyPatch, stage: Stage, rank: int) -> None:
    """srun --cpus-per-task=2: rank i may use CPUs 2i and 2i+1."""
    stage.mask = [2 * rank, 2 * rank + 1]
    stage.box = replace(BOX, allowed=tuple(stage.mask))
    for name, value in {"LOCALID": rank, "STEP_TASKS_PER_NODE": 4, "CPUS_PER_TASK": 2}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_a_mask_that_the_launcher_cut_is_kept(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(4):
        by_srun(monkeypatch, stage, rank)
        report = bind()
        assert (report.cpus, report.complete) == ((2 * rank, 2 * rank + 1), True)
        assert (report.memory, report.memory_nodes) == ("preferred", (rank // 2,))
        assert f"bound already by Slurm: CPUs {2 * rank}-{2 * rank + 1}" in str(report)
        assert "it was bound before" in str(bind())


def test_options_under_a_mask_that_the_launcher_cut(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [gpu.pci for gpu in BOX.gpus] * 2
    by_srun(monkeypatch, stage, 2)
    report = bind(mode="exclusive", reserve=1, devices=gpus)
    assert report.cpus == (4, 5)
    assert report.binding is not None
    assert report.binding.gpu == gpus[2]
    assert "mode = 'exclusive' is not used" in str(report)
    assert "reserve = 1 is not used" in str(report)
    by_srun(monkeypatch, stage, 1)
    report = bind(devices=gpus)
    assert report.cpus == (2, 3)
    assert "hangs on node 0" not in str(report)
    monkeypatch.setenv(binding.MARK, "")
    assert bind(cores="0-2").cpus == (2,)
    by_srun(monkeypatch, stage, 3)
    assert "holds none of this rank's CPUs" in str(bind(cores="0-2"))
    with pytest.raises(ds_numa.GpuLookupError, match="for each of 4 ranks"):
        bind(devices=gpus[:2])


def test_a_quota_is_shared_by_ranks_that_the_launcher_bound(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    by_srun(monkeypatch, stage, 1)
    stage.box = replace(stage.box, cpu_quota=4.0)
    report = bind(set_omp=True)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "the cgroup grants 4 CPUs of time to 4 ranks: run at most 1 thread in each" in str(report)


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
import os, sys, threading, ds_numa
from ds_numa import binding
before = sorted(os.sched_getaffinity(0))
stop = threading.Event()
worker = threading.Thread(target=stop.wait); worker.start()
strict = sys.argv[1] == "strict"
try:
    report = ds_numa.apply(ds_numa.Binding(0, tuple(before[-1:]), 1, (0,), "bind", (0,)), strict=strict)
except ds_numa.BindingError as error:
    report = error.report
masks = [sorted(os.sched_getaffinity(thread)) for thread in (0, worker.native_id)]
print(report, "|", masks == [before if strict else before[-1:]] * 2)
stop.set()
"""


@needs_two
@pytest.mark.parametrize("strict", ["strict", "soft"])
@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("set_mempolicy,get_mempolicy,mbind", "refused: memory policy preferred node 0 (EPERM"),
        ("set_mempolicy", "refused: memory policy bind node 0 (EPERM"),
        ("get_mempolicy", "the system refuses to read it back"),
    ],
)
def test_a_container_that_refuses_memory_policy_still_binds_cpus(calls: str, words: str, strict: str) -> None:
    tool = Path(__file__).with_name("refusing.py")
    done = subprocess.run(
        [sys.executable, str(tool), SOFT, strict],
        env=os.environ | {"REFUSED_CALLS": calls},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip("no seccomp filter can be set here")
    assert done.returncode == 0, done.stderr
    report, right = done.stdout.strip().split(" | ")
    assert words in report
    assert right == str(strict == "soft" or calls != "get_mempolicy")  # what is granted, strict leaves bound


def test_bindings_can_be_written_by_hand() -> None:
    assert str(Binding(0, (0, 1), 2, (0,))) == "CPUs 0-1 (2 cores, node 0)"

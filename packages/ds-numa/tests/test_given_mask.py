"""Masks that a launcher cut: simulated launchers on machines of 32 CPUs, and real processes on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ds_numa import Topology
from ds_numa._given_mask import GivenMask, find_given_mask

MACHINE = Topology.from_dict({"nodes": {"0": {"cpus": "0-15"}, "1": {"cpus": "16-31"}}})
QUARTERS = [range(8 * rank, 8 * rank + 8) for rank in range(4)]


def ranks_env(kind: str, rank: int, ranks: int) -> dict[str, str]:
    names = {
        "torchrun": ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "ompi": ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        "hydra": ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        "pals": ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
        "jsrun": ("JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
        "srun": ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    }[kind]
    return dict(zip(names, (str(rank), str(ranks)), strict=True))


def look(
    root: Path,
    kind: str,
    masks: Sequence[Sequence[int]],
    extra: dict[str, str] | None = None,
    machine: Topology = MACHINE,
) -> list[GivenMask | None]:
    """What each rank finds; `root` holds no processes, so that only the environment and the mask speak."""
    return [
        find_given_mask(
            ranks_env(kind, rank, len(masks)) | (extra or {}), machine, tuple(mask), rank, len(masks), root=root
        )
        for rank, mask in enumerate(masks)
    ]


def shares(found: Sequence[GivenMask | None]) -> list[tuple[int | None, int | None] | None]:
    return [None if one is None else (one.sharers, one.index) for one in found]


@pytest.mark.parametrize(
    "extra",
    [
        {"SLURM_CPUS_PER_TASK": "8"},
        {"SLURM_CPU_BIND": "quiet,mask_cpu:0x000000FF,0x0000FF00,0x00FF0000,0xFF000000"},
        {"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0xFF,0xFF00,0xFF0000,0xFF000000"},
    ],
)
def test_sruns_masks_are_each_ranks_own(tmp_path: Path, extra: dict[str, str]) -> None:
    found = look(tmp_path, "srun", QUARTERS, extra)
    assert shares(found) == [(1, 0)] * 4
    assert found[2] is not None
    assert found[2].note == "bound already by Slurm: CPUs 16-23"


def test_sruns_list_says_who_shares_a_mask(tmp_path: Path) -> None:
    halves = [range(16), range(16, 32), range(16), range(16, 32), range(16), range(16, 32)]
    env = {"SLURM_CPU_BIND": "quiet,mask_cpu:0xFFFF,0xFFFF0000"}  # the list starts again for the third task
    assert shares(look(tmp_path, "srun", halves, env)) == [(3, 0), (3, 0), (3, 1), (3, 1), (3, 2), (3, 2)]
    env = {"SLURM_CPU_BIND": "mask_cpu:0xFFFF*3,0xFFFF0000*3"}
    assert shares(look(tmp_path, "srun", sorted(halves, key=min), env)) == [(3, i) for i in (0, 1, 2, 0, 1, 2)]
    env = {"SLURM_CPU_BIND": "quiet,map_cpu:4,9"}
    assert shares(look(tmp_path, "srun", [[4], [9]], env)) == [(1, 0)] * 2


@pytest.mark.parametrize("bind", ["quiet,mask_cpu:0xFFFF", "quiet,none", "quiet,mask_cpu:bad", ""])
def test_a_mask_that_slurm_gave_the_whole_job_is_cut(tmp_path: Path, bind: str) -> None:
    """ConstrainCores without task/affinity: each of the four tasks may use the job's 16 CPUs."""
    env = {"SLURM_CPU_BIND": bind, "SLURM_CPUS_PER_TASK": "4"}
    assert shares(look(tmp_path, "srun", [range(16)] * 4, env)) == [None] * 4


def test_what_slurm_wrote_for_another_process_is_not_believed(tmp_path: Path) -> None:
    env = {"SLURM_CPU_BIND": "mask_cpu:0xF,0xF0,0xF00,0xF000"}  # masks that these ranks do not have
    assert shares(look(tmp_path, "srun", [range(32)] * 4, env)) == [None] * 4
    assert shares(look(tmp_path, "torchrun", [range(16)] * 4, env | ranks_env("srun", 0, 1))) == [None] * 4


@pytest.mark.parametrize("kind", ["ompi", "hydra", "pals", "jsrun"])
def test_ranks_bound_to_their_own_cores(tmp_path: Path, kind: str) -> None:
    assert shares(look(tmp_path, kind, QUARTERS)) == [(1, 0)] * 4
    lone = look(tmp_path, kind, [[0], [1]])  # Open MPI binds two ranks to one core each
    assert shares(lone) == [(1, 0)] * 2
    assert lone[0] is not None
    assert "the ranks together have 2 of 32 CPUs: start ranks unbound" in lone[0].note


@pytest.mark.parametrize("order", ["filled", "dealt"])
def test_two_ranks_on_each_socket_cut_it(tmp_path: Path, order: str) -> None:
    sockets = [range(16), range(16, 32)]
    masks = [sockets[rank // 2 if order == "filled" else rank % 2] for rank in range(4)]
    found = shares(look(tmp_path, "ompi", masks))
    taken = [(min(mask), one[1]) for mask, one in zip(masks, found, strict=True) if one]
    assert len(set(taken)) == 4  # every half of every socket once
    assert {one[0] for one in found if one} == {2}


def test_more_ranks_on_a_socket_cannot_be_told_apart_and_all_know(tmp_path: Path) -> None:
    masks = [range(16) if rank < 4 else range(16, 32) for rank in range(8)]
    found = look(tmp_path, "ompi", masks)
    assert shares(found) == [(4, None)] * 8
    assert found[0] is not None
    assert "left whole: start ranks unbound (mpirun --bind-to none" in found[0].note


@pytest.mark.parametrize("names", ["SLURM_CPU_BIND", "SLURM_CPU_BIND_TYPE"])
def test_srun_binds_to_sockets(tmp_path: Path, names: str) -> None:
    masks = [range(16), range(16), range(16, 32), range(16, 32)]
    assert shares(look(tmp_path, "srun", masks, {names: "quiet,sockets"})) == [(2, 0), (2, 1), (2, 0), (2, 1)]
    assert shares(look(tmp_path, "srun", QUARTERS, {names: "verbose,cores"})) == [(1, 0)] * 4
    assert shares(look(tmp_path, "srun", [range(8)] * 4, {names: "quiet,none"})) == [None] * 4


SMT = Topology.from_dict(
    {
        "nodes": {
            str(node): {"cpus": f"{4 * node}-{4 * node + 3},{16 + 4 * node}-{19 + 4 * node}"} for node in range(4)
        },
        "cores": [[cpu, cpu + 16] for cpu in range(16)],
        "sockets": ["0-7,16-23", "8-15,24-31"],
    }
)


@pytest.mark.parametrize(("groups", "ranks"), [("sockets", 4), ("nodes", 8), ("nodes", 4)])
@pytest.mark.parametrize("order", ["filled", "dealt"])
def test_parts_of_a_machine_with_siblings(tmp_path: Path, groups: str, ranks: int, order: str) -> None:
    parts = SMT.sockets if groups == "sockets" else [node.cpus for node in SMT.nodes]
    each = ranks // len(parts)
    masks = [parts[rank // each if order == "filled" else rank % len(parts)] for rank in range(ranks)]
    found = look(tmp_path, "ompi", masks, machine=SMT)
    taken = {(min(mask), one.index) for mask, one in zip(masks, found, strict=True) if one}
    assert len(taken) == ranks
    assert {one.sharers for one in found if one} == {each}


def test_masks_that_are_no_part_of_the_machine_are_left_whole(tmp_path: Path) -> None:
    assert shares(look(tmp_path, "ompi", [range(3, 23)] * 4)) == [(None, None)] * 4


@pytest.mark.parametrize("kind", ["torchrun", "ompi", "srun"])
def test_the_whole_machine_is_cut(tmp_path: Path, kind: str) -> None:
    assert shares(look(tmp_path, kind, [range(32)] * 4)) == [None] * 4


def test_a_container_under_torchrun_is_cut(tmp_path: Path) -> None:
    assert shares(look(tmp_path, "torchrun", [range(8)] * 4)) == [None] * 4


def test_a_cpuset_under_mpirun_is_cut(tmp_path: Path, put_process: Callable[..., None]) -> None:
    put_process(os.getpid(), 0, "0-7", {})
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpuset.cpus.effective").write_text("0-7\n")
    assert shares(look(tmp_path, "ompi", [range(8)] * 4)) == [None] * 4
    found = look(tmp_path, "srun", [range(8)] * 4, {"SLURM_CPUS_PER_TASK": "8"})
    assert shares(found) == [(1, 0)] * 4  # four tasks of eight CPUs cannot all be in here: each has its own cpuset


def test_one_rank_and_ranks_of_the_caller_are_no_launchers(tmp_path: Path) -> None:
    assert find_given_mask({}, MACHINE, range(8), 1, 4, root=tmp_path) is None
    assert find_given_mask(ranks_env("ompi", 0, 1), MACHINE, range(8), 0, 1, root=tmp_path) is None
    assert find_given_mask(ranks_env("ompi", 1, 2), MACHINE, range(8), 1, 4, root=tmp_path) is None


@pytest.mark.parametrize(
    ("kind", "launcher", "ranks", "expected"),
    [
        ("torchrun", "0-31", 4, (1, 0)),  # deepspeed --bind_cores_to_rank runs each rank under numactl
        ("torchrun", "0-7", 4, None),  # taskset around torchrun
        ("ompi", "0-7", 4, None),  # taskset around mpirun --bind-to none
        ("ompi", "0-15", 2, (1, 0)),
        ("ompi", "8-31", 4, (1, 0)),  # the launcher was moved meanwhile: the size of the mask decides
    ],
)
def test_the_launchers_mask_is_evidence(
    tmp_path: Path,
    put_process: Callable[..., None],
    kind: str,
    launcher: str,
    ranks: int,
    expected: tuple[int, int] | None,
) -> None:
    env = ranks_env(kind, 0, ranks)
    put_process(os.getpid(), 7, "0-7", env)
    put_process(7, 1, launcher, {"HOME": "/"})
    found = find_given_mask(env, MACHINE, range(8), 0, ranks, root=tmp_path)
    assert (found and (found.sharers, found.index)) == expected


CHILD = """
import json, os, ds_numa
report = ds_numa.bind(gpus=None)
print(json.dumps([report.cpus, sorted(os.sched_getaffinity(0)), report.complete, report.notes]))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)
@pytest.mark.parametrize("launched", ["bound by the launcher", "unbound"])
def test_real_processes_keep_what_their_launcher_cut(launched: str) -> None:
    mine = sorted(os.sched_getaffinity(0))[:2]
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mine)
    try:
        for rank, cpu in enumerate(mine):
            cut = {cpu} if launched == "bound by the launcher" else set(mine)
            done = subprocess.run(
                [sys.executable, "-c", CHILD],
                env=os.environ | ranks_env("torchrun", rank, 2),
                preexec_fn=lambda cut=cut: os.sched_setaffinity(0, cut),
                capture_output=True,
                text=True,
                timeout=60,
            )
            cpus, real, complete, notes = json.loads(done.stdout)
            assert (cpus, real, complete) == ([cpu], [cpu], True)
            assert any("bound already by" in note for note in notes) == (launched != "unbound")
    finally:
        os.sched_setaffinity(0, before)

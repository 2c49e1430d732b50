from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from ds_numa import Nic, Topology, plan_binding
from ds_numa._doctor import devices
from ds_numa._doctor.devices import near_cards
from ds_numa._doctor.examine import Placement
from ds_numa._doctor.jobs import Job, RankProcess
from ds_numa._doctor.verdict import Diagnosis, judge

GPUS = [f"0000:{i}a:00.0" for i in range(4)]
BOX = Topology.from_dict(
    {
        "nodes": {"0": {"cpus": "0-15"}, "1": {"cpus": "16-31"}, "2": {"kind": "hbm", "memory_bytes": 1 << 34}},
        "sockets": ["0-15", "16-31"],
        "gpus": [{"pci": pci, "node": i // 2, "uuid": f"GPU-{i}"} for i, pci in enumerate(GPUS)],
        "nics": [
            {"pci": "0000:1b:00.0", "node": 0, "names": ["mlx5_0"], "kind": "infiniband"},
            {"pci": "0000:3b:00.0", "node": 1, "names": ["mlx5_1"], "kind": "infiniband"},
        ],
    }
)
PLANNED = [list(plan_binding(BOX, 4, devices=list(GPUS))[rank].cpus) for rank in range(4)]
EVERYTHING = tuple(range(32))


def diagnose(
    masks: Sequence[Sequence[int]],
    *,
    memory: Mapping[int, Mapping[int, int]] | None = None,
    stray: Mapping[int, Mapping[tuple[int, ...], int]] | None = None,
    environ: Mapping[str, str] | None = None,
    gpus: Sequence[str | None] = GPUS,
    first: int = 0,
    size: int | None = None,
    parent: Sequence[int] = EVERYTHING,
    **options: Any,
) -> Diagnosis:
    """Judge a job of torchrun whose ranks have these masks."""
    ranks = tuple(RankProcess(100 + i, i + first, environ or {}, "python train.py") for i in range(len(masks)))
    placements = [
        Placement(tuple(mask), 4, (stray or {}).get(i, {}), (memory or {}).get(i, {0: 0}), "default", tuple(parent))
        for i, mask in enumerate(masks)
    ]
    return judge(BOX, Job("torchrun", 99, ranks, size), placements, gpus, **options)


def test_the_plan_itself_is_well() -> None:
    found = diagnose(PLANNED)
    assert found.ok
    assert [verdict.how for verdict in found.verdicts][3] == "CPUs 24-31, as a plan of mode 'auto' has it"
    assert str(found).splitlines()[-1] == "all ok"


@pytest.mark.parametrize("mode", ["node", "socket", "exclusive", "cores"])
def test_a_plan_of_another_mode_is_well_too(mode: Any) -> None:
    plan = plan_binding(BOX, 4, mode=mode, devices=list(GPUS))
    assert diagnose([plan[rank].cpus for rank in range(4)]).ok


def test_a_launchers_own_shares_are_well_where_they_are_apart_and_near() -> None:
    found = diagnose([[0, 1], [2, 3], [16, 17], [18, 19]])
    assert found.ok
    assert found.verdicts[0].how == "CPUs 0-1, its own, though another share than the plan's"


def test_ranks_that_nobody_bound_are_off() -> None:
    found = diagnose([EVERYTHING] * 4)
    assert not found.ok
    assert [verdict.off for verdict in found.verdicts] == [
        ("it is not bound: it may use all of the 32 CPUs that 4 ranks share",)
    ] * 4
    assert found.verdicts[2].how == f"the plan gives it CPUs {16}-{23}"
    assert str(found).splitlines()[-1] == "4 of 4 off"


def test_the_other_socket_and_shared_cpus_are_off() -> None:
    found = diagnose([PLANNED[2], PLANNED[1], PLANNED[2], PLANNED[3]])
    assert found.verdicts[0].off == (
        "it shares CPUs 16-23 with rank 2",
        "it may run on node 1, but its GPU hangs on node 0, of another socket",
    )
    assert [bool(verdict.off) for verdict in found.verdicts] == [True, False, False, False]


def test_memory_on_nodes_of_others_is_off_and_on_memory_nodes_it_is_not() -> None:
    gib = 1 << 30
    found = diagnose(PLANNED, memory={0: {0: gib, 1: gib}, 1: {0: gib, 2: gib}, 2: {0: gib // 32, 1: gib}})
    assert found.verdicts[0].off == ("1.00 GiB of its memory lie on node 1, where none of its CPUs are",)
    assert (found.verdicts[1].off, found.verdicts[2].off) == ((), ())


def test_threads_and_cards_elsewhere_are_off() -> None:
    found = diagnose(PLANNED, stray={1: {(30, 31): 2}}, environ={"NCCL_IB_HCA": "mlx5_1:1"})
    assert found.verdicts[1].off[0] == "2 of 4 threads may use CPUs 30-31"
    assert (
        "NCCL_IB_HCA = mlx5_1:1 names cards of node 1, but its GPU hangs on node 0, near mlx5_0"
        in found.verdicts[0].off
    )
    assert found.verdicts[3].off == ()


@pytest.mark.parametrize("value", ["mlx5_0,mlx5_1", "mlx5", "^mlx5_1", "=mlx5_0", "", "unknown"])
def test_cards_that_are_near_or_unknown_are_well(value: str) -> None:
    assert diagnose(PLANNED[:2], environ={"NCCL_IB_HCA": value}, gpus=GPUS[:2]).ok


def test_a_rank_that_is_not_seen_is_off_and_the_others_are_judged_without_a_plan() -> None:
    found = diagnose(PLANNED[1:3], first=1, gpus=GPUS[1:3], size=4)
    assert [verdict.local_rank for verdict in found.verdicts] == [0, 1, 2, 3]
    assert [verdict.pid for verdict in found.verdicts] == [None, 100, 101, None]
    assert found.verdicts[0].off == found.verdicts[3].off != ()
    assert str(found.verdicts[3]) == "rank 3: OFF: no process of it is seen: it has ended, or another user runs it"
    assert (found.verdicts[1].off, found.verdicts[1].planned) == ((), ())
    assert not found.ok


def test_a_number_of_ranks_that_cannot_be_is_no_flood() -> None:
    found = diagnose(PLANNED[:1], gpus=GPUS[:1], size=1_000_000)
    assert len(found.verdicts) == 65
    assert "999935 more ranks are not seen" in found.notes
    assert not found.ok


def test_all_ranks_have_ended() -> None:
    found = diagnose([], gpus=[], size=2)
    assert [verdict.pid for verdict in found.verdicts] == [None, None]
    assert not found.ok


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "bound by a program around it, or by itself"),
        ({"DS_NUMA_RUN": "{}"}, "bound by ds-numa run"),
        ({"DS_NUMA_BOUND": "0/4:0-7"}, "bound by ds-numa run"),
        (
            {"SLURM_LOCALID": "@", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_CPU_BIND": "mask_cpu:0xFF,0xFF00,0xFF0000"},
            "bound by Slurm, or later by itself",
        ),
        (
            {"OMPI_COMM_WORLD_LOCAL_RANK": "@", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            "bound by Open MPI, IBM Spectrum MPI, or later by itself",
        ),
    ],
)
def test_who_bound_a_rank_is_said(environ: dict[str, str], expected: str) -> None:
    told = {name: value.replace("@", "1") for name, value in environ.items()}
    assert diagnose(PLANNED, environ=told).verdicts[1].bound_by == expected
    assert expected in str(diagnose(PLANNED, environ=told).verdicts[1])
    assert diagnose([EVERYTHING] * 4, environ=told).verdicts[1].bound_by == ""


def test_a_launcher_that_was_cut_is_said_and_its_cpus_are_what_is_dealt_out() -> None:
    half = replace(BOX, allowed=tuple(range(16)))
    masks = [list(plan_binding(half, 2, devices=list(GPUS[:2]))[rank].cpus) for rank in range(2)]
    found = diagnose(masks, gpus=GPUS[:2], parent=range(16))
    assert found.notes[-1] == "the launcher itself may use CPUs 0-15 of 0-31 only"
    assert found.ok
    assert not [note for note in diagnose(PLANNED).notes if "launcher itself" in note]


def test_ranks_that_share_too_few_cpus_for_a_plan_are_off() -> None:
    found = diagnose([[0], [0]], gpus=[None, None], parent=[0])
    assert "no plan can be made" in found.notes[0]
    assert all(verdict.off for verdict in found.verdicts)


def test_the_nearest_cards_are_named() -> None:
    found = diagnose(PLANNED)
    assert [verdict.cards for verdict in found.verdicts] == [
        *["nearest network card: mlx5_0 on node 0"] * 2,
        *["nearest network card: mlx5_1 on node 1"] * 2,
    ]
    assert near_cards(BOX, None, [20]) == "nearest network card: mlx5_1 on node 1"
    alone = replace(BOX, nics=BOX.nics[:1])
    assert near_cards(alone, GPUS[3], [0]) == "nearest network card: mlx5_0 on node 0, of another socket"
    assert near_cards(replace(BOX, nics=(Nic("0000:1b:00.0"),)), GPUS[3], [0]) == ""
    many = replace(BOX, nics=tuple(Nic(f"0000:1{i}:00.0", 0, (f"mlx5_{i}",)) for i in range(6)))
    assert near_cards(many, GPUS[0], []) == (
        "nearest network card: mlx5_0, mlx5_1, mlx5_2, mlx5_3 and 2 more on node 0"
    )


@pytest.mark.parametrize("numbers_of_the_host", [True, False])
def test_nvml_is_believed_only_where_its_process_numbers_are_ours(
    numbers_of_the_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "nvml_users", lambda: {100: [GPUS[2]], 101: [GPUS[0], GPUS[1]], 102: ["0000:ff:00.0"]})
    monkeypatch.setattr(devices, "_host_process_numbers", lambda: numbers_of_the_host)
    ranks = [RankProcess(100 + i, i, {}, "") for i in range(3)]
    found, notes = devices.gpus_of_ranks(BOX, ranks)
    assert found == ([GPUS[2], GPUS[1], GPUS[2]] if numbers_of_the_host else list(GPUS[:3]))
    who = "ranks 1-2" if numbers_of_the_host else "ranks 0-2"
    assert notes == [f"NVML names no process of {who}: its GPU is taken from its environment and local rank"]


def test_one_rank_may_use_everything() -> None:
    assert diagnose([EVERYTHING], gpus=[None]).ok


def test_more_threads_than_cpus_are_noted() -> None:
    assert diagnose(PLANNED, environ={"OMP_NUM_THREADS": "32"}).verdicts[0].notes == (
        "OMP_NUM_THREADS = 32 is more than its 8 CPUs",
    )


def test_a_diagnosis_is_written_as_json() -> None:
    data = json.loads(json.dumps(diagnose([EVERYTHING] * 4).to_dict()))
    assert (data["ok"], data["launcher"], len(data["ranks"])) == (False, "torchrun", 4)
    assert (data["ranks"][1]["cpus"], data["ranks"][1]["planned"]) == ("0-31", "8-15")

from __future__ import annotations

import io
from typing import Any

import pytest
from ds_numa import Binding, Plan, Topology

BOX: dict[str, Any] = {
    "nodes": {
        "0": {"cpus": "0-3,8-11", "memory_bytes": 64 << 30},
        "1": {"cpus": "4-7,12-15", "memory_bytes": 32 << 30},
        "2": {"kind": "hbm", "memory_bytes": 16 << 30, "initiators": [0]},
    },
    "cores": [[i, i + 8] for i in range(8)],
    "allowed": "0-6,8-14",
    "allowed_memory": "0,2",
    "sockets": ["0-3,8-11", "4-7,12-15"],
    "l3": ["0-1,8-9", "2-3,10-11", "4-7,12-15"],
    "core_classes": ["0-3,8-11", "4-7,12-15"],
    "gpus": [
        {"pci": "0000:17:00.0", "node": 1, "uuid": "GPU-1", "model": "H200"},
        {"pci": "0000:c1:00.0", "vendor": "amd", "usable": False},
    ],
    "nics": [{"pci": "0000:18:00.0", "node": 1, "names": ["mlx5_0", "ib0"], "kind": "infiniband"}],
    "cpu_quota": 2.5,
    "notes": ["sys/devices/system/cpu/cpu7/topology is not told"],
}


def drawn(machine: Topology, plan: Plan | None = None) -> list[str]:
    out = io.StringIO()
    machine.show(plan, file=out)
    return out.getvalue().splitlines()


def test_everything_that_a_machine_has_is_drawn_once() -> None:
    assert drawn(Topology.from_dict(BOX)) == [
        "2 sockets, 3 nodes, 8 cores, 16 CPUs; allowed: CPUs 0-6,8-14",
        "socket 0: CPUs 0-3,8-11",
        "  node 0: CPUs 0-3,8-11, 64.0 GiB",
        "    L3    ## ##",
        "socket 1: CPUs 4-7,12-15",
        "  node 1: CPUs 4-7,12-15, 32.0 GiB (memory not allowed)",
        "    L3    ###x",
        "    GPU 0: 0000:17:00.0, H200",
        "    infiniband mlx5_0/ib0: 0000:18:00.0",
        "node 2: high-bandwidth memory, 16.0 GiB, nearest to node 0",
        "GPU 1: 0000:c1:00.0, amd (not for this process) (node unknown)",
        "kind 1 of cores, the fastest: CPUs 0-3,8-11",
        "kind 2 of cores, slower ones: CPUs 4-7,12-15",
        "quota of the cgroup: the time of 2.5 CPUs",
        "note: sys/devices/system/cpu/cpu7/topology is not told",
        "# a core, x a core that this process may not use",
    ]


def test_a_plan_shows_who_has_each_core() -> None:
    bindings = (Binding(0, (0, 1, 8, 9), 2, (0,)), Binding(1, (4, 12), 1, (1,), gpu="0000:17:00.0"))
    bindings += (Binding(2, (1, 9), 1, (0,)),)
    lines = drawn(Topology.from_dict(BOX), Plan(bindings))
    assert "    L3    0* .." in lines
    assert "    L3    1..x" in lines
    assert "    GPU 0: 0000:17:00.0, H200  rank 1" in lines
    assert "rank 1: CPUs 4,12 (1 core, node 1); GPU 0000:17:00.0" in lines
    assert lines[-1] == (
        "a digit is a core of that rank, . an idle core, x a core that this process may not use, "
        "* a core of several ranks"
    )


def test_a_node_in_two_sockets_is_drawn_in_both_and_its_devices_once() -> None:
    lines = drawn(
        Topology.from_dict(
            {"nodes": {"0": {"cpus": "0-3"}}, "sockets": ["0-1", "2-3"], "gpus": [{"pci": "0000:17:00.0", "node": 0}]}
        )
    )
    assert [line.strip() for line in lines if "node 0" in line] == [
        "node 0: CPUs 0-1 (of 0-3)",
        "node 0: CPUs 2-3 (of 0-3)",
    ]
    assert sum("GPU 0" in line for line in lines) == 1


def test_cpus_outside_the_told_sockets_are_not_lost() -> None:
    lines = drawn(Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}}, "sockets": ["0-1"]}))
    assert [line.strip() for line in lines if "CPUs 2-3" in line] == [
        "CPUs of no known socket: CPUs 2-3",
        "node 0: CPUs 2-3 (of 0-3)",
    ]


@pytest.mark.parametrize("cores", [7, 61, 94, 95, 400])
def test_every_core_is_drawn_once_within_the_width(cores: int) -> None:
    l3 = [f"{i}-{min(i + 7, cores - 1)}" for i in range(0, cores, 8)]
    for caches in (l3, [], [f"0-{cores - 1}"]):
        lines = drawn(Topology.from_dict({"nodes": {"0": {"cpus": f"0-{cores - 1}"}}, "l3": caches}))
        rows = [line for line in lines if set(line) <= set(" L3cores#") and "#" in line]
        assert sum(line.count("#") for line in rows) == cores
        assert max(map(len, rows)) <= 100


def test_ranks_past_the_letters_are_still_drawn() -> None:
    machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-69"}}})
    plan = Plan(tuple(Binding(rank, (rank,), 1, (0,)) for rank in range(70)))
    lines = drawn(machine, plan)
    assert lines[1].strip() == "node 0: CPUs 0-69"
    assert lines[2].split()[1] == "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + "+" * 8
    assert lines[-1].endswith("+ a core of a rank from 62 on")

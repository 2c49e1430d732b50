from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ds_numa import Topology
from ds_numa.errors import TopologyError

Machine = Callable[..., Path]


def test_two_sockets_with_smt(machine: Machine) -> None:
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    root = machine(
        "0-7",
        siblings=siblings,
        nodes={
            0: {"cpus": "0-1,4-5", "kb": 1024, "distance": "10 21"},
            1: {"cpus": "2-3,6-7", "kb": 2048, "distance": "21 10"},
        },
    )
    found = Topology.from_sysfs(root)
    assert found.cores == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert [(node.id, node.cpus, node.memory_bytes) for node in found.nodes] == [
        (0, (0, 1, 4, 5), 1 << 20),
        (1, (2, 3, 6, 7), 1 << 21),
    ]
    assert found.distance(0, 1) == 21
    assert found.allowed == tuple(range(8))
    assert found.numa


def test_newer_kernels_name_siblings_otherwise(machine: Machine) -> None:
    root = machine("0-3")
    for cpu, text in {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}.items():
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert Topology.from_sysfs(root).cores == ((0, 1), (2, 3))


def test_sparse_node_ids_lose_no_node(machine: Machine) -> None:
    nodes = {
        0: {"cpus": "0-1", "distance": "10 40 80"},
        8: {"cpus": "2-3", "distance": "40 10 80"},
        252: {"cpus": "", "distance": "80 80 10", "kb": 0},
    }
    found = Topology.from_sysfs(machine("0-3", nodes=nodes))
    assert [node.id for node in found.nodes] == [0, 8, 252]
    assert (found.distance(0, 8), found.distance(8, 252)) == (40, 80)


def test_the_mask_limits_and_never_widens(machine: Machine) -> None:
    root = machine("0-7", nodes={0: "0-3", 1: "4-7"})
    assert Topology.from_sysfs(root, allowed=[5, 6, 99]).allowed == (5, 6)
    with pytest.raises(TopologyError, match="holds no online CPU: allow some of 0-7"):
        Topology.from_sysfs(root, allowed=[99])


def test_offline_cpus_are_no_part_of_a_core(machine: Machine) -> None:
    root = machine("0,2-3", siblings={0: "0-1", 2: "2-3", 3: "2-3"}, nodes={0: "0-3"})
    found = Topology.from_sysfs(root)
    assert found.cores == ((0,), (2, 3))
    assert found.nodes[0].cpus == (0, 2, 3)


def test_no_node_folder_at_all(machine: Machine) -> None:
    found = Topology.from_sysfs(machine("0-3"))
    assert not found.numa
    assert [(node.id, node.cpus) for node in found.nodes] == [(0, (0, 1, 2, 3))]


def test_cpus_are_listed_where_the_kernel_does_not_say_which_are_online(machine: Machine) -> None:
    root = machine("", siblings={0: "0", 1: "1"})
    assert Topology.from_sysfs(root).allowed == (0, 1)


def test_a_folder_that_is_no_machine(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"has no sys/devices/system/cpu"):
        Topology.from_sysfs(tmp_path)


def kinds(root: Path) -> dict[int, str]:
    return {node.id: node.kind for node in Topology.from_sysfs(root).nodes}


def test_high_bandwidth_memory_is_known_by_its_bandwidth(machine: Machine) -> None:
    nodes = {
        0: {"cpus": "0-1", "kb": 9, "bandwidth": 200_000},
        1: {"cpus": "2-3", "kb": 9, "bandwidth": 200_000},
        2: {"kb": 9, "bandwidth": 700_000, "near": 0},
        3: {"kb": 9, "bandwidth": 700_000, "near": 1},
    }
    assert kinds(machine("0-3", nodes=nodes)) == {0: "cpu", 1: "cpu", 2: "hbm", 3: "hbm"}


@pytest.mark.parametrize(
    "node",
    [
        {"kb": 9},  # firmware says nothing
        {"kb": 9, "bandwidth": 700_000, "near": 7},  # nothing to compare with
    ],
)
def test_other_memory_without_cpus_is_not_guessed_at(machine: Machine, node: dict[str, int]) -> None:
    root = machine("0-1", nodes={0: {"cpus": "0-1", "kb": 9, "bandwidth": 200_000}, 1: node})
    assert kinds(root)[1] == "unknown"


GRACE = {
    0: {"cpus": "0-71", "kb": 480 << 20, "bandwidth": 300_000},
    1: {"kb": 96 << 20, "bandwidth": 400_000, "near": 0},
    **{number: {"kb": 0} for number in range(2, 9)},
}


def test_grace_shows_the_gpus_memory_and_spare_nodes(machine: Machine) -> None:
    root = machine("0-71", nodes=GRACE, nvidia={"0009:01:00.0": ("GPU-1", "GH200", 1)}, initiators="1-8")
    assert kinds(root) == {0: "cpu", 1: "gpu", **dict.fromkeys(range(2, 9), "empty")}


def test_grace_without_the_driver_is_not_taken_for_high_bandwidth_memory(machine: Machine) -> None:
    assert kinds(machine("0-71", nodes=GRACE, initiators="1-8"))[1] == "unknown"


def test_a_sandbox_that_shows_an_empty_folder_has_the_cpus_of_the_mask(tmp_path: Path) -> None:
    (tmp_path / "sys/devices/system/cpu").mkdir(parents=True)
    found = Topology.from_sysfs(tmp_path, allowed=[2, 0])
    assert (found.allowed, found.cores) == ((0, 2), ((0,), (2,)))

from __future__ import annotations

import json
from typing import Any

import pytest
from ds_numa import Gpu, Node, Topology
from ds_numa.errors import TopologyError

FULL = {
    "nodes": {
        "0": {
            "cpus": "0-1,4-5",
            "memory_bytes": 1 << 30,
            "kind": "cpu",
            "distances": {"0": 10, "8": 40},
            "initiators": [0],
        },
        "8": {
            "cpus": "2-3,6-7",
            "memory_bytes": None,
            "kind": "cpu",
            "distances": {"0": 40, "8": 10},
            "initiators": [8],
        },
        "9": {"cpus": "", "memory_bytes": 1 << 20, "kind": "hbm", "distances": {}, "initiators": [8]},
    },
    "cores": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "allowed": "0-3,5",
    "allowed_memory": "0,8",
    "gpus": [
        {"pci": "0000:c1:00.0", "node": 8, "uuid": "GPU-1", "memory_node": None, "model": "X"}
        | {"vendor": "nvidia", "usable": True, "ordinals": [0]}
    ],
    "numa": True,
    "sockets": ["0-1,4-5", "2-3,6-7"],
    "l3": ["0-1,4-5", "2-3,6-7"],
    "core_classes": ["0-1,4-5", "2-3,6-7"],
    "nics": [{"pci": "0000:c2:00.0", "node": 8, "names": ["mlx5_0", "ib0"], "kind": "infiniband"}],
    "visible": ["0000:c1:00.0"],
    "cpu_quota": 1.5,
    "notes": ["something is unknown"],
}


def test_a_description_survives_json() -> None:
    machine = Topology.from_dict(FULL)
    assert machine.to_dict() == FULL
    assert Topology.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine
    assert machine.gpus == (Gpu("0000:c1:00.0", 8, "GPU-1", None, "X", ordinals=(0,)),)
    assert machine.node(8).cpus == (2, 3, 6, 7)
    assert (machine.sockets_of(8), machine.sockets_of(9)) == ((1,), (0, 1))
    assert (machine.distance(0, 8), machine.distance(9, 9), machine.distance(9, 0)) == (40, 10, 20)


def test_a_short_description_fills_in_the_rest() -> None:
    machine = Topology.from_dict({"nodes": {"1": {"cpus": "2-3"}, "0": {"cpus": [0, 1]}, "2": {}}})
    assert [(node.id, node.cpus, node.kind) for node in machine.nodes] == [
        (0, (0, 1), "cpu"),
        (1, (2, 3), "cpu"),
        (2, (), "unknown"),
    ]
    assert machine.cores == ((0,), (1,), (2,), (3,))
    assert machine.allowed == (0, 1, 2, 3)


def test_it_can_be_a_key() -> None:
    assert len({Topology.from_dict(FULL), Topology.from_dict(FULL)}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": {}}, "nodes have ids"),
        ({"nodes": None}, "no description of a machine"),
        ({"nodes": {"a": {}}}, "no description of a machine"),
        ({"nodes": {"0": {"cpus": "3-1"}}}, "runs backwards"),
        ({"cores": [[0, 4], [4, 1]]}, "lists a CPU twice"),
        ({"cores": [[0]]}, "in no core"),
        ({"allowed": "0,99"}, "holds CPUs 99"),
        ({"allowed": ""}, "holds nothing"),
        ({"gpus": [{"bus": 1}]}, "no description of a machine"),
        ({"nodes": {"0": {"cpus": "0-7", "kind": "hbm"}}}, "of kind 'hbm'"),
        ({"nodes": {"0": {"cpus": "0-7"}, "1": {"kind": "dram"}}}, "of kind 'dram'"),
    ],
)
def test_a_contradictory_description_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.from_dict({**FULL, **change})


def test_direct_construction_is_checked_as_well() -> None:
    with pytest.raises(TopologyError, match="must ascend"):
        Topology(nodes=(Node(0, (0, 1)),), cores=((0,), (1,)), allowed=(1, 0))
    with pytest.raises(TopologyError, match="which are in no core"):
        Topology(nodes=(Node(0, (0, 1)),), cores=((0,),), allowed=(0,))
    with pytest.raises(TopologyError, match="node_id = 4 is no node"):
        Topology(nodes=(Node(0, (0,)),), cores=((0,),), allowed=(0,)).node(4)

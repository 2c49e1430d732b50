"""Shares that no two ranks have in common: ``mode="auto"`` and ``mode="cores"``."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from check_plan import check_plan
from ds_numa import Plan, Topology, plan_binding
from ds_numa.errors import NotEnoughCoresError

GIB = 1 << 30


def box(
    sockets: int = 2, nodes: int = 1, cores: int = 8, caches: int = 1, gpus: tuple[int | None, ...] = (), **more: Any
) -> Topology:
    """`nodes` a socket and `cores` and `caches` a node; CPUs in order; the i-th GPU hangs on node ``gpus[i]``."""
    total = sockets * nodes

    def distance(a: int, b: int) -> int:
        return 10 if a == b else 12 if a // nodes == b // nodes else 32

    def cut(size: int) -> list[list[int]]:
        return [list(range(start, start + size)) for start in range(0, total * cores, size)]

    entries = {
        str(a): {
            "cpus": cut(cores)[a],
            "memory_bytes": GIB,
            "distances": {str(b): distance(a, b) for b in range(total)},
        }
        for a in range(total)
    }
    facts = [{"pci": f"0000:{i:02x}:00.0", "node": node, "uuid": str(i)} for i, node in enumerate(gpus)]
    data = {"nodes": entries, "sockets": cut(nodes * cores), "l3": cut(cores // caches), "gpus": facts}
    return Topology.from_dict(data | more)


def counts(plan: Plan) -> list[int]:
    return [binding.num_cores for binding in plan.bindings]


def nodes(plan: Plan) -> list[tuple[int, ...]]:
    return [binding.nodes for binding in plan.bindings]


def test_gpus_of_one_socket_keep_their_ranks_there() -> None:
    machine = box(gpus=(0, 0, 0, 0, 1, 1, 1, 1))
    plan = plan_binding(machine, 4)
    assert nodes(plan) == [(0,)] * 4
    assert counts(plan) == [2, 2, 2, 2]
    assert plan.idle == tuple(range(8, 16))
    assert plan.notes == (
        "CPUs 8-15 stay idle: they are on another socket than the ranks' GPUs (mode='cores' uses them)",
    )


def test_cores_uses_the_other_socket_too_and_says_so() -> None:
    plan = plan_binding(box(gpus=(0, 0, 0, 0)), 4, mode="cores")
    assert counts(plan) == [4, 4, 4, 4]
    assert plan.idle == ()
    assert plan.notes == ("ranks 2-3 got CPUs on another socket than the GPU",)


def test_cores_brings_each_rank_near_to_its_gpu() -> None:
    plan = plan_binding(box(nodes=2, gpus=(3, 2, 1, 0)), 4, mode="cores")
    assert nodes(plan) == [(3,), (2,), (1,), (0,)]
    assert plan.notes == ()


def test_nodes_of_the_same_socket_without_gpus_are_used_whole() -> None:
    plan = plan_binding(box(nodes=4, gpus=(0, 2)), 2)
    assert nodes(plan) == [(0, 1), (2, 3)]
    assert plan.idle == tuple(range(32, 64))


def test_the_sockets_are_inferred_from_distances_where_they_are_not_named() -> None:
    named = box(nodes=4, gpus=(0, 2))
    bare = Topology.from_dict(named.to_dict() | {"sockets": []})
    assert plan_binding(bare, 2) == plan_binding(named, 2)


def test_a_node_of_several_sockets_is_one_place() -> None:
    """AMD's NPS0: the kernel does not say which of the two sockets the GPU hangs on."""
    machine = Topology.from_dict(
        {"nodes": {"0": {"cpus": "0-15"}}, "sockets": ["0-7", "8-15"], "gpus": [{"pci": "0000:01:00.0", "node": 0}]}
    )
    plan = plan_binding(machine, 1)
    assert plan[0].num_cores == 16
    assert plan.notes == ()
    assert [b.cpus[0] for b in plan_binding(machine, 2, devices=None).bindings] == [0, 8]


def test_a_mask_without_the_gpus_socket_is_said() -> None:
    plan = plan_binding(box(gpus=(0, 1), allowed="8-15"), 2)
    assert nodes(plan) == [(1,), (1,)]
    assert plan.notes == (
        "the GPU of rank 0 hangs on node 0, which has no usable cores: node 1 is the nearest that has some",
        "rank 0 got CPUs on another socket than the GPU",
    )


def test_a_mask_without_the_gpus_node_stays_on_the_socket() -> None:
    plan = plan_binding(box(nodes=2, gpus=(0, 2)), 2, cores="8-31")
    assert nodes(plan) == [(1,), (2, 3)]
    assert plan.notes == (
        "the GPU of rank 0 hangs on node 0, which has no usable cores: node 1 is the nearest that has some",
    )


def test_a_crowded_node_shares_its_socket() -> None:
    plan = plan_binding(box(nodes=2, cores=4, gpus=(0,) * 6), 6)
    assert counts(plan) == [2, 2, 1, 1, 1, 1]
    assert {node for binding in plan.bindings for node in binding.nodes} == {0, 1}


def test_a_crowded_socket_is_left_and_that_is_said() -> None:
    plan = plan_binding(box(cores=2, gpus=(0, 0, 0)), 3)
    assert sorted(counts(plan)) == [1, 1, 2]
    assert any("too few allowed cores for their ranks" in note for note in plan.notes)
    assert any("on another socket than the GPU" in note for note in plan.notes)


def test_ranks_that_share_a_gpu_get_slices_of_its_node() -> None:
    plan = plan_binding(box(gpus=(0, 1)), 8, devices=["0000:01:00.0"] * 8)
    assert [binding.cpus for binding in plan.bindings] == [(cpu,) for cpu in range(8, 16)]


def test_a_gpu_of_unknown_node_on_the_only_node() -> None:
    plan = plan_binding(box(sockets=1, gpus=(None,)), 1)
    assert plan[0].nodes == (0,)
    assert plan.notes == ()


def test_a_rank_without_a_gpu_settles_where_there_is_room() -> None:
    plan = plan_binding(box(gpus=(0, 0)), 3, devices=["0000:00:00.0", "0000:01:00.0", None])
    assert nodes(plan) == [(0,), (0,), (1,)]


def test_cuts_fall_on_sockets_first_then_nodes_then_caches() -> None:
    machine = box(nodes=2, cores=6, caches=2)
    lopsided = plan_binding(machine, 3, cores="0-6,12-23")  # 7 cores on socket 0
    assert lopsided[0].cpus == tuple(range(7)), "the socket's edge"
    by_node = plan_binding(machine, 3, cores="0-5,6-11,12-16")  # 17: 6, 6, 5
    assert nodes(by_node) == [(0,), (1,), (2,)]
    caches = Topology.from_dict({"nodes": {"0": {"cpus": "0-10"}}, "l3": ["0-4", "5-10"]})
    assert [binding.cpus for binding in plan_binding(caches, 2).bindings] == [tuple(range(5)), tuple(range(5, 11))]


def test_a_sockets_edge_goes_before_a_nodes() -> None:
    machine = Topology.from_dict(
        {"nodes": {"0": {"cpus": "0-6"}, "1": {"cpus": "7"}, "2": {"cpus": "8-14"}}, "sockets": ["0-6", "7-14"]}
    )
    assert counts(plan_binding(machine, 2)) == [7, 8]


def interleaved(gpus: tuple[int, ...] = ()) -> Topology:
    """Nodes 0 and 2 are one socket, 1 and 3 the other, and the kernel gives no distances."""
    facts = [{"pci": f"0000:{i:02x}:00.0", "node": node} for i, node in enumerate(gpus)]
    nodes = {str(a): {"cpus": [2 * a, 2 * a + 1]} for a in range(4)}
    return Topology.from_dict({"nodes": nodes, "sockets": ["0-1,4-5", "2-3,6-7"], "gpus": facts})


def test_the_nodes_of_a_socket_are_dealt_out_together() -> None:
    assert nodes(plan_binding(interleaved(), 2)) == [(0, 2), (1, 3)]


def test_a_node_without_cores_is_replaced_by_one_of_its_socket() -> None:
    assert nodes(plan_binding(interleaved((3,)), 1, cores="0-5")) == [(1,)]


def test_a_rank_without_a_gpu_leaves_the_near_cores_to_the_others() -> None:
    plan = plan_binding(box(gpus=(1,)), 2, mode="cores", devices=["0000:00:00.0", None])
    assert nodes(plan) == [(1,), (0,)]


def test_who_has_fewer_cores_of_its_own_node_gets_more_of_the_next() -> None:
    machine = Topology.from_dict(
        {
            "nodes": {"0": {"cpus": "0-2"}, "1": {"cpus": "3-5"}},
            "sockets": ["0-5"],
            "l3": ["0-2", "3", "4-5"],
            "gpus": [{"pci": f"0000:0{i}:00.0", "node": 0} for i in range(2)],
        }
    )
    assert counts(plan_binding(machine, 2)) == [3, 3]


def test_cuts_inside_a_gpus_node_fall_on_caches() -> None:
    machine = Topology.from_dict(
        {
            "nodes": {"0": {"cpus": "0-10"}, "1": {"cpus": "11-12"}},
            "l3": ["0-4", "5-10", "11-12"],
            "sockets": ["0-10", "11-12"],
            "gpus": [{"pci": f"0000:0{i}:00.0", "node": 0} for i in range(2)],
        }
    )
    assert [binding.cpus for binding in plan_binding(machine, 2).bindings] == [tuple(range(5)), tuple(range(5, 11))]


@pytest.mark.parametrize("ranks", range(1, 9))
def test_fast_and_slow_cores_are_dealt_evenly(ranks: int) -> None:
    # 6 P cores with two CPUs each, 8 E cores: an Intel Core i5-13600K
    machine = Topology.from_dict(
        {
            "nodes": {"0": {"cpus": "0-19"}},
            "cores": [[2 * i, 2 * i + 1] for i in range(6)] + [[i] for i in range(12, 20)],
            "core_classes": ["0-11", "12-19"],
        }
    )
    plan = plan_binding(machine, ranks)
    fast = [len([cpu for cpu in binding.cpus if cpu < 12]) // 2 for binding in plan.bindings]
    slow = [len([cpu for cpu in binding.cpus if cpu >= 12]) for binding in plan.bindings]
    assert (sum(fast), sum(slow)) == (6, 8)
    for dealt in (fast, slow, counts(plan)):
        assert max(dealt) - min(dealt) <= 1


def invent(dice: random.Random) -> Topology:
    """A machine of random shape: sparse nodes, SMT, nodes without CPUs, a random mask, GPUs anywhere."""
    ids = sorted(dice.sample(range(12), dice.randint(1, 5)))
    smt, number, found, cores = dice.choice([1, 2, 4]), 0, {}, []
    order = list(range(4 * 8 * 5))
    if dice.random() < 0.5:
        dice.shuffle(order)  # the kernel numbers CPUs in many ways
    for node in ids:
        mine = []
        for _ in range(dice.randint(0 if len(ids) > 1 else 1, 8)):
            cores.append([order[number + i] for i in range(smt)])
            mine += cores[-1]
            number += smt
        distances = {str(other): 10 if other == node else dice.choice([12, 20, 32]) for other in ids}
        kind = dice.choice(["hbm", "ram", "cxl", "gpu", "unknown", "empty"])
        found[str(node)] = {"cpus": mine, "memory_bytes": dice.choice([0, GIB]), "distances": distances}
        if not mine:
            found[str(node)] |= {"kind": kind, "initiators": dice.sample(ids, dice.randint(0, 1))}
    if not cores:
        return invent(dice)
    cpus = [cpu for core in cores for cpu in core]

    def group(parts: int) -> list[list[int]]:
        """Cores in a few groups, whatever node they are on; sometimes unknown."""
        owners = [dice.randrange(parts) for _ in cores]
        groups: dict[int, list[int]] = {}
        for core, owner in zip(cores, owners, strict=True):
            groups.setdefault(owner, []).extend(core)
        return [] if dice.random() < 0.4 else list(groups.values())

    return Topology.from_dict(
        {
            "nodes": found,
            "cores": cores,
            "allowed": dice.sample(cpus, dice.randint(1, len(cpus))) if dice.random() < 0.5 else cpus,
            "allowed_memory": dice.sample(ids, dice.randint(1, len(ids))) if dice.random() < 0.3 else None,
            "gpus": [
                {"pci": f"0000:{i:02x}:00.0", "node": dice.choice([None, 13, *ids]), "uuid": str(i)} for i in range(8)
            ],
            "sockets": group(3),
            "l3": group(5),
            "core_classes": group(2),
            "cpu_quota": dice.choice([None, 0.5, 3.0, 400.0]),
        }
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_plan_of_an_invented_machine_keeps_its_promises(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(20):
        machine = invent(dice)
        core_of = {cpu: core for core in machine.cores for cpu in core}
        usable = {core_of[cpu] for cpu in machine.allowed}
        ranks = dice.randint(1, len(usable))
        pcis = [gpu.pci for gpu in machine.gpus]
        mode: Any = dice.choice(["auto", "auto", "cores", "node", "socket", "l3", "exclusive"])
        arguments: dict[str, Any] = {
            "mode": mode,
            "devices": dice.choice([None, "auto", dice.choices(pcis, k=ranks), dice.choices([None, *pcis], k=ranks)]),
            "smt": dice.random() < 0.7,
            "reserve": dice.choice([0, 0, dice.randint(0, len(usable) - ranks)]),
            "memory": dice.choice(["preferred", "bind", "interleave"]),
        }
        try:
            plan = plan_binding(machine, ranks, **arguments)
        except NotEnoughCoresError:
            assert mode == "exclusive" or arguments["reserve"] == len(usable)
            continue
        assert plan == plan_binding(machine, ranks, **arguments), "every rank makes the same plan"
        check_plan(machine, plan, mode=mode, smt=arguments["smt"], reserve=arguments["reserve"])

"""The modes that follow each device: ``node``, ``socket``, ``l3``, ``exclusive``. Torch is the oracle elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from ds_numa import Plan, Topology, plan_binding
from ds_numa.errors import NotEnoughCoresError

# Two sockets of two nodes; a node has two caches of two cores with two CPUs each: CPUs 8a to 8a + 7.
DATA: dict[str, Any] = {
    "nodes": {str(a): {"cpus": list(range(8 * a, 8 * a + 8))} for a in range(4)},
    "cores": [[2 * i, 2 * i + 1] for i in range(16)],
    "sockets": ["0-15", "16-31"],
    "l3": [list(range(4 * i, 4 * i + 4)) for i in range(8)],
}


def box(gpus: list[int | None] | None = None, **more: Any) -> Topology:
    facts = [{"pci": f"0000:{i:02x}:00.0", "node": node, "uuid": str(i)} for i, node in enumerate(gpus or [])]
    return Topology.from_dict(DATA | {"gpus": facts} | more)


def first_and_last(plan: Plan) -> list[tuple[int, int]]:
    for binding in plan.bindings:
        assert list(binding.cpus) == list(range(binding.cpus[0], binding.cpus[-1] + 1))
    return [(binding.cpus[0], binding.cpus[-1]) for binding in plan.bindings]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("node", [(8, 15), (8, 15), (24, 31)]),
        ("socket", [(0, 15), (0, 15), (16, 31)]),
        ("l3", [(8, 11), (12, 15), (24, 27)]),
        ("exclusive", [(8, 11), (12, 15), (24, 31)]),
    ],
)
def test_each_mode_follows_the_gpu(mode: Any, expected: list[tuple[int, int]]) -> None:
    plan = plan_binding(box([1, 1, 3]), 3, mode=mode)
    assert first_and_last(plan) == expected
    assert plan.notes == ()
    assert plan.idle == tuple(cpu for cpu in range(32) if not any(cpu in range(a, b + 1) for a, b in expected))


@pytest.mark.parametrize(
    ("mode", "ranks", "expected"),
    [
        ("node", 4, [(0, 7), (8, 15), (16, 23), (24, 31)]),
        ("node", 2, [(0, 7), (16, 23)]),
        ("node", 6, [(0, 7), (0, 7), (8, 15), (16, 23), (16, 23), (24, 31)]),
        ("socket", 4, [(0, 15), (0, 15), (16, 31), (16, 31)]),
        ("l3", 4, [(0, 3), (8, 11), (16, 19), (24, 27)]),
        ("l3", 16, [(4 * (i // 2), 4 * (i // 2) + 3) for i in range(16)]),
        ("exclusive", 8, [(4 * i, 4 * i + 3) for i in range(8)]),
        ("exclusive", 1, [(0, 7)]),
    ],
)
def test_ranks_without_gpus_are_spread_evenly(mode: Any, ranks: int, expected: list[tuple[int, int]]) -> None:
    assert first_and_last(plan_binding(box(), ranks, mode=mode)) == expected


def test_exclusive_counts_gpus_that_no_rank_uses() -> None:
    seen = box([1, 1, 3], visible=["0000:01:00.0", "0000:02:00.0"])
    assert first_and_last(plan_binding(box([1, 1, 3]), 1, mode="exclusive")) == [(8, 11)]
    assert first_and_last(plan_binding(seen, 1, mode="exclusive")) == [(8, 15)]
    assert first_and_last(plan_binding(box([1, 1, 3]), 1, mode="l3", devices=["0000:01:00.0"])) == [(12, 15)]
    unusable = Topology.from_dict(seen.to_dict() | {"visible": None})
    gpus = [vars(gpu) | {"usable": gpu.pci != "0000:00:00.0"} for gpu in unusable.gpus]
    unusable = Topology.from_dict(unusable.to_dict() | {"gpus": gpus})
    assert first_and_last(plan_binding(unusable, 1, mode="exclusive")) == [(8, 15)]


def test_exclusive_gives_ranks_of_one_gpu_their_own_slices() -> None:
    plan = plan_binding(box([1, 3]), 4, mode="exclusive", devices=["0000:00:00.0"] * 4)
    assert first_and_last(plan) == [(8, 9), (10, 11), (12, 13), (14, 15)]


def test_exclusive_with_and_without_gpus() -> None:
    plan = plan_binding(box([0, None]), 2, mode="exclusive")
    assert first_and_last(plan) == [(0, 7), (16, 23)]
    assert plan.notes == (
        "the machine does not say on which node the GPU of rank 1 hangs: "
        "placed as if it had none, so its cores may be far from it",
    )


def test_exclusive_needs_a_core_for_each_gpu() -> None:
    with pytest.raises(NotEnoughCoresError, match="the 4 usable cores of node 2 among the 5 GPUs or ranks"):
        plan_binding(box([2] * 5), 1, mode="exclusive")
    with pytest.raises(NotEnoughCoresError, match="the 1 usable core of node 2 among the 2 GPUs"):
        plan_binding(box([2, 2]), 2, mode="exclusive", cores="0-15,16-17")


def test_a_node_without_usable_cores_is_replaced_and_that_is_said() -> None:
    plan = plan_binding(box([0, 2], allowed="8-15"), 2, mode="node")
    assert first_and_last(plan) == [(8, 15), (8, 15)]
    assert plan.notes == (
        "the GPU of rank 0 hangs on node 0, which has no usable cores: node 1 is the nearest that has some",
        "the GPU of rank 1 hangs on node 2, which has no usable cores: node 1 is the nearest that has some",
        "rank 1 got CPUs on another socket than the GPU",
    )


def test_unnamed_sockets_and_caches_are_said() -> None:
    bare = Topology.from_dict({"nodes": DATA["nodes"], "cores": DATA["cores"]})
    plan = plan_binding(bare, 2, mode="socket")
    assert first_and_last(plan) == [(0, 7), (16, 23)]
    assert plan.notes == ("the machine does not name its sockets: nodes nearer to each other than 20 count as one",)
    plan = plan_binding(bare, 2, mode="l3")
    assert first_and_last(plan) == [(0, 7), (16, 23)]
    assert plan.notes == ("the machine does not name its last-level caches: a node counts as one",)


def test_the_caches_with_the_most_allowed_cpus_come_first() -> None:
    plan = plan_binding(box([0, 0, 0], allowed="0-2,4-31"), 3, mode="l3")
    assert first_and_last(plan) == [(4, 7), (0, 2), (4, 7)]


def test_a_socket_of_a_node_that_spans_two_is_both() -> None:
    wide = Topology.from_dict({"nodes": {"0": {"cpus": "0-15"}}, "sockets": ["0-7", "8-15"]})
    assert first_and_last(plan_binding(wide, 2, mode="socket")) == [(0, 7), (8, 15)]
    with_gpu = Topology.from_dict(wide.to_dict() | {"gpus": [{"pci": "0000:01:00.0", "node": 0}]})
    assert first_and_last(plan_binding(with_gpu, 1, mode="socket")) == [(0, 15)]


@pytest.mark.parametrize("mode", ["node", "socket", "l3", "exclusive"])
def test_one_cpu_of_each_core_and_a_reserve(mode: Any) -> None:
    plan = plan_binding(box([0, 1]), 2, mode=mode, smt=False, reserve=4)
    assert all(cpu % 2 == 0 for binding in plan.bindings for cpu in binding.cpus)
    assert not {cpu for binding in plan.bindings for cpu in binding.cpus} & {0, 8, 16, 24}
    assert all(len(binding.cpus) == binding.num_cores for binding in plan.bindings)


def test_nodes_that_list_the_same_cpus() -> None:
    fake = Topology.from_dict(
        {"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "0-3"}}, "gpus": [{"pci": "0000:01:00.0", "node": 1}]}
    )
    plan = plan_binding(fake, 1, mode="node")
    assert plan[0].nodes == (0, 1)
    assert plan.notes == ()


def test_more_ranks_than_cores_share_whole_nodes() -> None:
    plan = plan_binding(box([0]), 40, mode="node", devices=["0000:00:00.0"] * 40)
    assert first_and_last(plan) == [(0, 7)] * 40

from __future__ import annotations

import json
from typing import Any

import pytest
from ds_numa import Plan, Topology, parse_range_list, plan_binding
from ds_numa.errors import CoreListError, GpuLookupError, NotEnoughCoresError, PlanError, RankError

GIB = 1 << 30


def machine(nodes: dict[int, Any], smt: int = 1, **more: Any) -> Topology:
    """Nodes by id, as a list of CPUs or a mapping; with ``smt=2`` the CPUs i and i + n/2 are siblings."""
    entries = {str(number): {"cpus": entry} if isinstance(entry, str) else entry for number, entry in nodes.items()}
    cores = None
    if smt > 1:
        count = sum(len(parse_range_list(entry["cpus"])) for entry in entries.values())
        cores = [list(range(i, count, count // smt)) for i in range(count // smt)]
    return Topology.from_dict({"nodes": entries, "cores": cores, **more})


TWO_SOCKETS = machine({0: "0-7,16-23", 1: "8-15,24-31"}, smt=2)


def shares(plan: Plan) -> list[tuple[int, ...]]:
    return [binding.cpus for binding in plan.bindings]


def memory(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    return [(binding.memory, binding.memory_nodes) for binding in plan.bindings]


def test_two_sockets_two_ranks() -> None:
    plan = plan_binding(TWO_SOCKETS, 2)
    assert shares(plan) == [(*range(8), *range(16, 24)), (*range(8, 16), *range(24, 32))]
    assert [binding.nodes for binding in plan.bindings] == [(0,), (1,)]
    assert [binding.omp_num_threads for binding in plan.bindings] == [8, 8]
    assert memory(plan) == [("preferred", (0,)), ("preferred", (1,))]
    assert plan.notes == ()


def test_the_remainder_is_dealt_out() -> None:
    assert [len(cpus) for cpus in shares(plan_binding(machine({0: "0-6"}), 2))] == [4, 3]


def test_one_cpu_of_each_core_and_a_word_about_it() -> None:
    plan = plan_binding(TWO_SOCKETS, 2, smt=False)
    assert shares(plan) == [tuple(range(8)), tuple(range(8, 16))]
    assert plan.notes == ("one CPU of each core is used: the sibling CPUs 16-31 stay idle",)


def test_sparse_nodes() -> None:
    plan = plan_binding(machine({0: "0-3", 8: "4-7", 252: {"cpus": "", "memory_bytes": 0, "kind": "empty"}}), 2)
    assert [binding.nodes for binding in plan.bindings] == [(0,), (8,)]
    assert memory(plan) == [("preferred", (0,)), ("preferred", (8,))]


def test_a_cpuset_limits_the_plan() -> None:
    limited = machine({0: "0-7", 1: "8-15"}, allowed="2-5,14-15")
    plan = plan_binding(limited, 3)
    assert shares(plan) == [(2, 3), (4, 5), (14, 15)]
    assert [binding.nodes for binding in plan.bindings] == [(0,), (0,), (1,)]


def test_memory_outside_the_cpuset_is_left_alone() -> None:
    limited = machine({0: "0-3", 1: "4-7"}, allowed_memory="0")
    assert memory(plan_binding(limited, 2)) == [("none", ()), ("none", ())]


def test_one_node_has_no_memory_to_choose() -> None:
    assert memory(plan_binding(machine({0: "0-3"}), 2)) == [("none", ())] * 2


def test_a_rank_that_has_every_node_has_no_memory_to_choose() -> None:
    assert memory(plan_binding(TWO_SOCKETS, 1, memory="bind")) == [("none", ())]


def test_no_numa() -> None:
    flat = machine({0: "0-3"}, numa=False)
    assert shares(plan_binding(flat, 2)) == [(0, 1), (2, 3)]
    assert memory(plan_binding(flat, 2, memory="bind")) == [("none", ())] * 2


@pytest.mark.parametrize("mode", ["preferred", "prefer", "bind", "interleave"])
def test_high_bandwidth_memory_is_preferred_and_never_bound(mode: Any) -> None:
    near = {"0": 10, "1": 21, "2": 13, "3": 23}, {"0": 21, "1": 10, "2": 23, "3": 13}
    xeon = machine(
        {
            0: {"cpus": "0-3", "distances": near[0]},
            1: {"cpus": "4-7", "distances": near[1]},
            2: {"kind": "hbm", "memory_bytes": 64 * GIB},
            3: {"kind": "hbm", "memory_bytes": 64 * GIB},
        }
    )
    assert memory(plan_binding(xeon, 2, memory=mode)) == [("preferred", (2,)), ("preferred", (3,))]


def test_a_gpus_memory_is_never_chosen() -> None:
    grace = machine({0: "0-71", 1: {"kind": "gpu", "memory_bytes": 96 * GIB}, 2: {"kind": "empty", "memory_bytes": 0}})
    assert memory(plan_binding(grace, 2, memory="bind")) == [("bind", (0,))] * 2


def test_nodes_that_list_the_same_cpus_are_chosen_together() -> None:
    fake = machine({0: "0-3", 1: "0-3", 2: "4-7", 3: "4-7"})  # the kernel's numa=fake=4 on two sockets
    plan = plan_binding(fake, 2, memory="bind")
    assert shares(plan) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert memory(plan) == [("bind", (0, 1)), ("bind", (2, 3))]


def test_a_node_without_memory_uses_the_nearest() -> None:
    far = {"0": 10, "1": 30, "2": 12}
    box = machine(
        {
            0: {"cpus": "0-1", "memory_bytes": 0, "distances": far},
            1: {"cpus": "2-3", "memory_bytes": GIB},
            2: {"cpus": "4-5", "memory_bytes": GIB},
        }
    )
    assert memory(plan_binding(box, 3))[0] == ("preferred", (2,))


def test_fewer_ranks_than_nodes_get_whole_neighbouring_nodes() -> None:
    # Nodes 0 and 2 are one socket, 1 and 3 the other.
    distances = {a: {str(b): 10 if a == b else 12 if a % 2 == b % 2 else 32 for b in range(4)} for a in range(4)}
    box = machine({a: {"cpus": f"{4 * a}-{4 * a + 3}", "distances": distances[a]} for a in range(4)})
    assert [binding.nodes for binding in plan_binding(box, 2).bindings] == [(0, 2), (1, 3)]


def test_more_ranks_than_cores_split_siblings_and_say_so() -> None:
    plan = plan_binding(machine({0: "0-3"}, smt=2), 4)
    assert shares(plan) == [(0,), (1,), (2,), (3,)]
    assert plan.notes == ("4 ranks share 2 cores: sibling CPUs are dealt out one by one",)


def test_more_ranks_than_cpus() -> None:
    with pytest.raises(NotEnoughCoresError, match=r"num_local_procs = 5 ranks need 5 CPUs, but 4 may be used \(0-3\)"):
        plan_binding(machine({0: "0-7"}, allowed="0-3"), 5)
    with pytest.raises(NotEnoughCoresError):
        plan_binding(machine({0: "0-3"}, smt=2), 4, smt=False)


def test_cores_may_come_in_any_order() -> None:
    assert shares(plan_binding(TWO_SOCKETS, 2, cores="8-9,0-1")) == [(0, 1), (8, 9)]
    assert shares(plan_binding(TWO_SOCKETS, 1, cores=iter([3, 1]))) == [(1, 3)]


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ("3-1", r"cores = '3-1': '3-1' runs backwards"),
        ("", r"cores = '' is empty"),
        ("0,0", r"cores = '0,0' names 0 twice"),
        ([1, 1], r"cores = \[1, 1\] must name each CPU once"),
        ([], r"cores = \[\] must name each CPU once, and at least one"),
        ("0-3,40", r"cores = '0-3,40': CPUs 40 are not online here: choose from 0-3"),
        ("2-5", r"cores = '2-5': CPUs 4-5 are outside this process's CPU mask .*: choose from 0-3"),
    ],
)
def test_bad_cores(cores: Any, message: str) -> None:
    with pytest.raises(CoreListError, match=message):
        plan_binding(machine({0: "0-7"}, allowed="0-3"), 2, cores=cores)


@pytest.mark.parametrize("ranks", [0, -1, True, 2.0, "2"])
def test_bad_number_of_ranks(ranks: Any) -> None:
    with pytest.raises(RankError, match="num_local_procs = "):
        plan_binding(TWO_SOCKETS, ranks)


def test_bad_memory_mode() -> None:
    with pytest.raises(PlanError, match="memory = 'strict' must be one of"):
        plan_binding(TWO_SOCKETS, 2, memory="strict")  # type: ignore[arg-type]


def test_a_plan_is_indexed_by_rank_and_written_as_json() -> None:
    plan = plan_binding(TWO_SOCKETS, 2)
    assert plan[1].local_rank == 1
    with pytest.raises(RankError, match=r"local_rank = 2 must lie in 0\.\.1"):
        plan[2]
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["bindings"][1]["cpus"] == "8-15,24-31"
    assert data["bindings"][1]["omp_num_threads"] == 8


# GPUs


def gpu_box(nodes: dict[int, Any], gpus: list[int | None], **more: Any) -> tuple[Topology, list[str]]:
    names = [f"0000:{16 + i:02x}:00.0" for i in range(len(gpus))]
    facts = [{"pci": name, "node": node, "uuid": name} for name, node in zip(names, gpus, strict=True)]
    return machine(nodes, gpus=facts, **more), names


def test_ranks_live_where_their_gpus_hang() -> None:
    box, names = gpu_box({0: "0-7", 1: "8-15"}, [1, 1, 0, 0])
    plan = plan_binding(box, 4, gpus=names)
    assert shares(plan) == [(8, 9, 10, 11), (12, 13, 14, 15), (0, 1, 2, 3), (4, 5, 6, 7)]
    assert [binding.gpu for binding in plan.bindings] == names
    # In CUDA's order, whatever that is: rank 0 uses the machine's third GPU.
    assert plan_binding(box, 2, gpus=[names[2].upper(), names[0]])[0].nodes == (0,)


def test_uneven_gpus_keep_their_ranks_local() -> None:
    box, names = gpu_box({0: "0-8", 1: "9-17"}, [0, 0, 1])
    assert [binding.num_cores for binding in plan_binding(box, 3, gpus=names).bindings] == [5, 4, 9]


def test_cores_of_nodes_without_gpus_go_to_the_nearest_ranks() -> None:
    # Four nodes a socket, GPUs on nodes 3, 1, 7, 5 only.
    def distances(a: int) -> dict[str, int]:
        return {str(b): 10 if a == b else 12 if a // 4 == b // 4 else 32 for b in range(8)}

    nodes = {a: {"cpus": f"{4 * a}-{4 * a + 3}", "distances": distances(a)} for a in range(8)}
    box, names = gpu_box(nodes, [3, 1, 7, 5])
    plan = plan_binding(box, 4, gpus=names)
    assert [binding.num_cores for binding in plan.bindings] == [8, 8, 8, 8]
    for binding, home in zip(plan.bindings, [3, 1, 7, 5], strict=True):
        assert set(range(4 * home, 4 * home + 4)) <= set(binding.cpus)
        assert {node // 4 for node in binding.nodes} == {home // 4}


def test_a_gpu_of_unknown_node_goes_where_there_is_room() -> None:
    box, names = gpu_box({0: "0-3", 1: "4-7"}, [0, None])
    assert shares(plan_binding(box, 2, gpus=names)) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_gpu_whose_node_has_no_allowed_cores_uses_the_nearest() -> None:
    nodes = {
        0: {"cpus": "0-3", "distances": {"0": 10, "1": 12, "2": 32}},
        1: {"cpus": "4-7", "distances": {"0": 12, "1": 10, "2": 32}},
        2: {"cpus": "8-11", "distances": {"0": 32, "1": 32, "2": 10}},
    }
    box, names = gpu_box(nodes, [2, 0], allowed="4-11")
    assert shares(plan_binding(box, 2, gpus=names)) == [(8, 9, 10, 11), (4, 5, 6, 7)]


@pytest.mark.parametrize(
    ("homes", "allowed", "note"),
    [
        ([None, None, None], "0-7", "does not say on which node the GPU of ranks 0-2 hangs"),
        ([0, 0, 0], "2-7", "dealt out equally instead"),
    ],
)
def test_gpus_that_cannot_be_followed_are_said_so(homes: list[int | None], allowed: str, note: str) -> None:
    box, names = gpu_box({0: "0-3", 1: "4-7"}, homes, allowed=allowed)
    plan = plan_binding(box, 3, gpus=names)
    assert note in plan.notes[0]
    counts = [binding.num_cores for binding in plan.bindings]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (["0000:10:00.0"], "one PCI address .* for each of the 2 ranks"),
        ("0000:10:00.0", "one PCI address"),
        (["0000:10:00.0", "0000:ff:00.0"], r"\['0000:ff:00.0'\], which this machine does not have"),
        (["0000:10:00.0", "1"], "is not a PCI address"),
    ],
)
def test_bad_gpus(gpus: Any, message: str) -> None:
    box, _ = gpu_box({0: "0-3", 1: "4-7"}, [0, 1])
    with pytest.raises(GpuLookupError, match=message):
        plan_binding(box, 2, gpus=gpus)


def test_auto_follows_what_the_job_sees() -> None:
    box, names = gpu_box({0: "0-3", 1: "4-7"}, [0, 0, 1, 1], visible=None)
    assert [binding.gpu for binding in plan_binding(box, 2).bindings] == names[:2]
    box, names = gpu_box({0: "0-3", 1: "4-7"}, [0, 0, 1, 1], visible=["0000:13:00.0", "0000:10:00.0"])
    assert shares(plan_binding(box, 2)) == [(4, 5, 6, 7), (0, 1, 2, 3)]
    few = plan_binding(box, 3)
    assert [binding.gpu for binding in few.bindings] == [None] * 3
    assert few.notes == ("devices are left out: 3 ranks see 2, so which rank uses which is unknown: pass devices=",)
    assert [binding.gpu for binding in plan_binding(box, 2, devices=None).bindings] == [None, None]


def test_auto_takes_one_vendors_usable_gpus() -> None:
    gpus = [
        {"pci": "0000:01:00.0", "node": 0, "vendor": "amd"},
        {"pci": "0000:02:00.0", "node": 0, "vendor": "nvidia", "usable": False},
        {"pci": "0000:03:00.0", "node": 1, "vendor": "nvidia"},
    ]
    box = machine({0: "0-3", 1: "4-7"}, gpus=gpus)
    assert plan_binding(box, 1)[0].gpu == "0000:03:00.0"
    assert plan_binding(box, 1, devices=["0000:01:00.0"])[0].nodes == (0,)


def test_two_names_for_the_devices_are_one_too_many() -> None:
    box, names = gpu_box({0: "0-3", 1: "4-7"}, [0, 1])
    with pytest.raises(PlanError, match=r"devices = .* and gpus = .* mean the same"):
        plan_binding(box, 2, devices=names, gpus=names)
    with pytest.raises(GpuLookupError, match="devices = 'all' must be 'auto', None or list"):
        plan_binding(box, 2, devices="all")  # type: ignore[arg-type]


# What is set aside


def test_reserved_cores_come_from_each_node_in_turn() -> None:
    plan = plan_binding(TWO_SOCKETS, 2, reserve=3)
    assert plan.idle == (0, 1, 8, 16, 17, 24)
    assert plan.notes == ("3 cores of reserve=3 stay free: CPUs 0-1,8,16-17,24",)
    assert [binding.nodes for binding in plan.bindings] == [(0,), (1,)]
    assert "idle: CPUs 0-1,8,16-17,24" in str(plan).splitlines()
    assert plan.to_dict()["idle"] == "0-1,8,16-17,24"


@pytest.mark.parametrize("reserve", [-1, True, 1.0, "1", None])
def test_bad_reserve(reserve: Any) -> None:
    with pytest.raises(PlanError, match="reserve = "):
        plan_binding(TWO_SOCKETS, 2, reserve=reserve)


@pytest.mark.parametrize("reserve", [7, 8, 100])
def test_a_reserve_leaves_every_rank_a_core(reserve: int) -> None:
    with pytest.raises(NotEnoughCoresError):
        plan_binding(machine({0: "0-7"}), 2, reserve=reserve)
    with pytest.raises(NotEnoughCoresError, match=f"reserve = {reserve} leaves"):
        plan_binding(machine({0: "0-15"}, smt=2), 2, reserve=reserve)


def test_ranks_that_share_cpus_are_advised_their_part_of_the_threads() -> None:
    box, names = gpu_box({0: "0-6", 1: "7-9"}, [0, 0, 1, 1])
    plan = plan_binding(box, 3, mode="node", devices=names[:3])
    assert [(b.num_cores, b.thread_limit, b.omp_num_threads) for b in plan.bindings] == [
        (7, 3, 3),
        (7, 3, 3),
        (3, 3, 3),
    ]
    assert [b.omp_num_threads for b in plan_binding(box, 10, mode="node", devices=names[:1] * 10).bindings] == [1] * 10
    assert plan_binding(box, 4)[0].thread_limit is None


def test_a_quota_limits_the_advised_threads_and_not_the_cpus() -> None:
    plan = plan_binding(machine({0: "0-7"}, cpu_quota=5.5), 2)
    assert [len(cpus) for cpus in shares(plan)] == [4, 4]
    assert [(binding.thread_limit, binding.omp_num_threads) for binding in plan.bindings] == [(2, 2)] * 2
    assert plan.notes == (
        "the cgroup grants 5.5 CPUs of time; the mask has 8 CPUs: run at most 2 threads in each rank",
    )
    assert plan_binding(machine({0: "0-7"}, cpu_quota=0.5), 2)[0].omp_num_threads == 1
    roomy = plan_binding(machine({0: "0-7"}, cpu_quota=8.0), 2)
    assert roomy.notes == ()
    assert roomy[0].omp_num_threads == 4


def test_bad_mode() -> None:
    with pytest.raises(PlanError, match="mode = 'numa' must be one of"):
        plan_binding(TWO_SOCKETS, 2, mode="numa")  # type: ignore[arg-type]

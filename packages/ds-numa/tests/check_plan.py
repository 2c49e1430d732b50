"""What every plan has to keep, worked out from the machine alone. Shared by the tests of plans."""

from __future__ import annotations

from collections.abc import Sequence

from ds_numa import Plan, Topology

DISJOINT = ("auto", "cores", "exclusive")


def spread(counts: Sequence[int]) -> int:
    return max(counts) - min(counts)


def socket_groups(box: Topology) -> list[set[int]]:
    """CPUs that are within reach of each other: of sockets and nodes that overlap, or of near nodes."""
    nodes = [set(node.cpus) for node in box.nodes if node.cpus]
    if box.sockets:
        groups = [*nodes, *(set(socket) for socket in box.sockets)]
    else:
        near = [
            set(a.cpus) | set(b.cpus)
            for a in box.nodes
            for b in box.nodes
            if a.cpus and b.cpus and min(a.distances.get(b.id, 20), b.distances.get(a.id, 20)) < 20
        ]
        groups = nodes + near
    merged: list[set[int]] = []
    for group in groups:
        touching = [other for other in merged if other & group]
        merged = [other for other in merged if not other & group] + [group.union(*touching)]
    return merged


def check_plan(box: Topology, plan: Plan, *, mode: str, smt: bool, reserve: int = 0) -> None:
    """Raise `AssertionError` unless the plan keeps what every plan of this mode promises."""
    core_of = {cpu: core for core in box.cores for cpu in core}
    usable = {core_of[cpu] for cpu in box.allowed}
    may = set(box.allowed)
    ranks = len(plan)
    dealt = [cpu for binding in plan.bindings for cpu in binding.cpus]

    # What is dealt out is allowed, and the rest is named.
    assert set(dealt) <= may
    assert set(plan.idle) == may - set(dealt)
    assert plan.idle == tuple(sorted(plan.idle))
    for binding in plan.bindings:
        assert binding.cpus, "a rank without a CPU"
        assert binding.cpus == tuple(sorted(set(binding.cpus)))
        mine = {core_of[cpu] for cpu in binding.cpus}
        assert binding.num_cores == len(mine)
        assert binding.omp_num_threads <= binding.num_cores
        assert set(binding.nodes) == {node.id for node in box.nodes if set(node.cpus) & set(binding.cpus)}
        if not smt:
            assert len(binding.cpus) == len(mine)
        elif ranks <= len(usable) - reserve:
            assert set(binding.cpus) == {cpu for core in mine for cpu in core} & may, "a core was split"

    if mode in DISJOINT:
        assert len(dealt) == len(set(dealt)), "a CPU went to two ranks"
    if mode == "cores" or (mode == "auto" and not any(binding.gpu for binding in plan.bindings)):
        if ranks <= len(usable) - reserve:
            assert spread([binding.num_cores for binding in plan.bindings]) <= 1
            for kind in box.core_classes:
                assert (
                    spread([len({core_of[c] for c in b.cpus} & {core_of[c] for c in kind}) for b in plan.bindings]) <= 1
                )
            assert len({core_of[cpu] for cpu in dealt}) == len(usable) - reserve, "a core was lost"
        if smt and not reserve:
            assert set(dealt) == may, "a CPU was lost"
    check_devices(box, plan, mode, reserve)
    check_memory(box, plan)


def check_devices(box: Topology, plan: Plan, mode: str, reserve: int) -> None:
    core_of = {cpu: core for core in box.cores for cpu in core}
    cpus_of = {node.id: set(node.cpus) for node in box.nodes if node.cpus}
    node_of = {gpu.pci: gpu.node for gpu in box.gpus if gpu.node in cpus_of}
    may, groups = set(box.allowed), socket_groups(box)
    fallback = any("dealt out equally" in note for note in plan.notes)
    across = set()
    by_home: dict[int, list[int]] = {}  # how many cores of its GPU's node each rank has
    for binding in plan.bindings:
        node = node_of.get(binding.gpu or "")
        if node is None:
            continue
        cpus, home = set(binding.cpus), cpus_of[node]
        reach = next(group for group in groups if home <= group)
        by_home.setdefault(node, []).append(len({core_of[cpu] for cpu in cpus & home}))
        if not cpus <= reach:
            across.add(binding.local_rank)
            assert mode == "cores" or fallback or reserve or not reach & may, "a rank left its GPU's socket"
        if reserve or not home & may:
            continue
        if mode in ("node", "l3", "exclusive"):
            assert cpus <= home
        if mode == "node":
            assert {core_of[cpu] for cpu in cpus} == {core_of[cpu] for cpu in home & may}
        if mode == "socket":
            assert {core_of[cpu] for cpu in cpus} == {core_of[cpu] for cpu in reach & may}
        if mode == "l3" and box.l3:
            assert sum(not cpus.isdisjoint(cache) for cache in box.l3) <= 1
    said = [note for note in plan.notes if "on another socket than the GPU" in note]
    bare = {node.id for node in box.nodes if not node.cpus}  # which socket such a GPU is near to is left open here
    if not any(gpu.node in bare for gpu in box.gpus if gpu.pci in {binding.gpu for binding in plan.bindings}):
        assert bool(across) == bool(said), "a rank left its GPU's socket unsaid"
    if mode == "auto" and not fallback and not reserve:
        for node, counts in by_home.items():
            if len({core_of[cpu] for cpu in cpus_of[node] & may}) >= len(plan):
                assert min(counts) >= 1, "a rank got no core next to its GPU"
                assert spread(counts) <= 1, "the ranks of a node share it unevenly"
        idle = [set(plan.idle) & group for group in groups if not group.isdisjoint(set(plan.idle))]
        lived_in = {cpu for binding in plan.bindings for cpu in binding.cpus}
        if all(len(core) == 1 for core in box.cores):  # else siblings may be idle
            assert all(group.isdisjoint(lived_in) for group in groups if group & set().union(*idle)), (
                "idle beside a rank"
            )


def check_memory(box: Topology, plan: Plan) -> None:
    usable = {node.id: node.kind for node in box.nodes if node.memory_bytes != 0 and node.kind != "empty"}
    allowed = usable.keys() if box.allowed_memory is None else usable.keys() & set(box.allowed_memory)
    for binding in plan.bindings:
        chosen = set(binding.memory_nodes)
        assert chosen <= allowed, "memory that the process may not use"
        assert (binding.memory == "none") == (not chosen)
        assert not chosen & {node for node, kind in usable.items() if kind in ("gpu", "cxl", "unknown")}
        if binding.memory == "bind":
            assert not {kind for node, kind in usable.items() if node in allowed - chosen} & {"unknown"}
            assert not any(usable[node] == "hbm" for node in chosen)
        if binding.memory == "interleave":
            assert len(chosen) > 1

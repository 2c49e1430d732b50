from __future__ import annotations

from typing import Any

import pytest
from ds_numa import Topology, plan_binding
from ds_numa.errors import PlanError

GIB = 1 << 30
TWO = {"0": {"cpus": "0-3", "memory_bytes": 64 * GIB}, "1": {"cpus": "4-7", "memory_bytes": 64 * GIB}}


def plan(
    extra: dict[str, Any], mode: Any, ranks: int = 2, **more: Any
) -> tuple[list[tuple[str, tuple[int, ...]]], str]:
    machine = Topology.from_dict({"nodes": TWO | extra, **more})
    made = plan_binding(machine, ranks, memory=mode)
    return [(binding.memory, binding.memory_nodes) for binding in made.bindings], " | ".join(made.notes)


def test_the_modes() -> None:
    assert plan({}, "preferred") == ([("preferred", (0,)), ("preferred", (1,))], "")
    assert plan({}, "prefer") == plan({}, "preferred")
    assert plan({}, "bind") == ([("bind", (0,)), ("bind", (1,))], "")
    assert plan({}, "none") == ([("none", ())] * 2, "")


@pytest.mark.parametrize("mode", ["strict", "", None, 1])
def test_bad_modes(mode: Any) -> None:
    with pytest.raises(PlanError, match=r"memory = .* must be one of 'preferred', 'bind', 'interleave', 'none'"):
        plan({}, mode)


def test_interleave_needs_several_nodes() -> None:
    assert plan({}, "interleave", ranks=1) == ([("interleave", (0, 1))], "")
    chosen, notes = plan({}, "interleave")
    assert chosen == [("none", ())] * 2
    assert notes == "memory='interleave' needs several nodes with memory: ranks on nodes 0-1 alone keep the default"


@pytest.mark.parametrize("mode", ["preferred", "bind"])
def test_ordinary_memory_without_cpus_belongs_to_the_nearest_rank(mode: str) -> None:
    by_firmware = {"2": {"kind": "ram", "memory_bytes": 64 * GIB, "initiators": [1]}}
    assert plan(by_firmware, mode) == ([(mode, (0,)), (mode, (1, 2))], "")
    by_distance = {
        "0": {**TWO["0"], "distances": {"0": 10, "1": 21, "2": 12}},
        "1": {**TWO["1"], "distances": {"0": 21, "1": 10, "2": 32}},
        "2": {"kind": "ram", "memory_bytes": 64 * GIB},
    }
    assert plan(by_distance, mode) == ([(mode, (0, 2)), (mode, (1,))], "")
    to_both = {"2": {"kind": "ram", "memory_bytes": 64 * GIB}}
    assert plan(to_both, mode) == ([(mode, (0, 2)), (mode, (1, 2))], "")


def test_a_strict_policy_never_shuts_out_memory_of_unknown_kind() -> None:
    unknown = {"2": {"memory_bytes": 192 * GIB}}
    chosen, notes = plan(unknown, "bind")
    assert chosen == [("preferred", (0,)), ("preferred", (1,))]
    assert "memory='bind' would shut out node 2 (192.0 GiB) of unknown kind" in notes
    assert plan(unknown, "bind", allowed_memory="0-1") == ([("bind", (0,)), ("bind", (1,))], "")
    chosen, notes = plan(unknown, "preferred")
    assert chosen == [("preferred", (0,)), ("preferred", (1,))]
    assert "node 2 (192.0 GiB) of unknown kind that no rank asks for" in notes
    assert plan({"2": {}}, "bind")[0][0][0] == "preferred", "of unknown size"


def test_high_bandwidth_memory_goes_to_its_own_ranks_only() -> None:
    near = {"2": {"kind": "hbm", "memory_bytes": 16 * GIB, "initiators": [1]}}
    assert plan(near, "preferred") == ([("preferred", (0,)), ("preferred", (2,))], "")
    chosen, notes = plan(near, "bind")
    assert chosen == [("bind", (0,)), ("preferred", (2,))]
    assert "high-bandwidth memory is preferred" in notes
    _, notes = plan(near, "preferred", allowed="0-3")
    assert "node 2 (16.0 GiB) of high-bandwidth memory that is near to no rank" in notes


def test_memory_expanders_are_not_asked_for() -> None:
    expander = {"2": {"kind": "cxl", "memory_bytes": 128 * GIB}}
    assert plan(expander, "preferred") == ([("preferred", (0,)), ("preferred", (1,))], "")
    chosen, notes = plan(expander, "bind")
    assert chosen == [("bind", (0,)), ("bind", (1,))]
    assert "node 2 (128.0 GiB) on a memory expander that memory='bind' shuts out" in notes


def test_a_gpus_own_memory_is_never_chosen() -> None:
    assert plan({"2": {"kind": "gpu", "memory_bytes": 96 * GIB}}, "bind") == ([("bind", (0,)), ("bind", (1,))], "")


def test_an_accelerated_processor_is_ordinary() -> None:
    gpus = [{"pci": f"0000:0{i}:00.0", "node": i, "vendor": "amd", "memory_node": i} for i in range(2)]
    assert plan({}, "bind", gpus=gpus) == ([("bind", (0,)), ("bind", (1,))], "")


def test_memory_that_is_not_allowed_is_not_chosen() -> None:
    ram = {"2": {"kind": "ram", "memory_bytes": 64 * GIB}}
    assert plan(ram, "bind", allowed_memory="0-1") == ([("bind", (0,)), ("bind", (1,))], "")
    assert plan({}, "bind", allowed_memory="0") == ([("none", ())] * 2, "")

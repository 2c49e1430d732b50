from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ds_numa import Topology
from ds_numa._doctor import measure as module
from ds_numa._doctor.measure import measure

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
LARGE = Topology.from_dict({"nodes": {str(i): {"cpus": f"{4 * i}-{4 * i + 3}"} for i in range(24)}})


@pytest.fixture
def may_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_policy_refusal", lambda: None)


@pytest.mark.usefixtures("may_place")
def test_24_nodes_take_the_time_that_was_given_and_own_memory_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(cpus: Sequence[int], memory: int | None, seconds: float) -> float:
        time.sleep(max(seconds, 0.004))  # the placing of the memory takes its time, however short the slot is
        return 1.0

    monkeypatch.setattr(module, "_copy", copy)
    began = time.monotonic()
    found = measure(LARGE, seconds=0.6)
    assert time.monotonic() - began < 1.2
    measured = [(cpus, memory) for cpus, row in found.copy.items() for memory in row]
    assert {(node, node) for node in range(24)} <= set(measured)
    assert len(measured) < 24 * 24
    assert any(note.startswith("no time was left to measure the copies of node ") for note in found.notes)


@pytest.mark.usefixtures("may_place")
def test_a_few_nodes_are_all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[float] = []

    def copy(cpus: Sequence[int], memory: int | None, seconds: float) -> float:
        slots.append(seconds)
        time.sleep(seconds)
        return 10.0 + (memory or 0)

    monkeypatch.setattr(module, "_copy", copy)
    two = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}, "2": {"kind": "hbm"}}})
    found = measure(two, seconds=0.3)
    assert found.copy == {0: {0: 10.0, 1: 11.0, 2: 12.0}, 1: {0: 10.0, 1: 11.0, 2: 12.0}}
    assert sum(slots) == pytest.approx(0.3, abs=0.1)
    assert found.notes[0].startswith("memory of node 2 (hbm) is faster")


def test_a_node_that_is_not_there_is_said_and_not_measured() -> None:
    cpu = min(os.sched_getaffinity(0))
    nodes = {"0": {"cpus": str(cpu)}, "900": {"kind": "ram"}}
    found = measure(Topology.from_dict({"nodes": nodes}), seconds=0.1)
    assert 900 not in {memory for row in found.copy.values() for memory in row}
    assert any("900" in note or "memory policy is refused" in note for note in found.notes)


REFUSED = """
import dataclasses, json, os
from ds_numa import Topology
from ds_numa._doctor.measure import measure
cpu = min(os.sched_getaffinity(0))
machine = Topology.from_dict({"nodes": {"0": {"cpus": str(cpu)}, "1": {"kind": "ram"}}})
print(json.dumps(dataclasses.asdict(measure(machine, 0.1))))
"""


def test_refused_memory_policy_leaves_each_nodes_own_memory() -> None:
    helper = Path(__file__).with_name("refusing.py")
    done = subprocess.run([sys.executable, str(helper), REFUSED], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel allows no seccomp filter")
    found = json.loads(done.stdout)
    assert list(found["copy"]) == ["0"], done.stderr
    assert list(found["copy"]["0"]) == ["0"]
    assert found["copy"]["0"]["0"] > 0.1
    assert "only each node's own memory is measured" in found["notes"][0]


def test_a_full_node_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0/meminfo").write_text("Node 0 MemTotal: 99 kB\nNode 0 MemFree:        20480 kB\n")
    monkeypatch.setattr(module, "_NODES", tmp_path)
    with pytest.raises(OSError, match=r"too little of its memory is free \(20 MiB\)"):
        module._check_room(0, 6 << 20)
    module._check_room(0, 4 << 20)
    module._check_room(1, 1 << 40)  # nothing is known of it
    module._check_room(None, 1 << 40)


def test_a_gpu_without_memory_to_spare_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0)
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: facts)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    def fail(*arguments: Any) -> float:
        raise RuntimeError("CUDA out of memory.\nmore of it")

    monkeypatch.setattr(module, "_copy", lambda *arguments: 1.0)
    monkeypatch.setattr(module, "_to_gpu", fail)
    machine = Topology.from_dict({"nodes": {"0": {"cpus": "0"}}, "gpus": [{"pci": "0000:17:00.0", "uuid": "GPU-1"}]})
    found = measure(machine, seconds=0.1)
    assert found.to_gpu == {}
    assert "copies from node 0 to GPU 0000:17:00.0 were not measured: CUDA out of memory." in found.notes

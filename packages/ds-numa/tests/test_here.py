from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ds_numa import Gpu, Topology, _here

Machine = Callable[..., Path]


def test_this_machine_agrees_with_psutil() -> None:
    found = Topology.here()
    assert found.allowed == tuple(sorted(psutil.Process().cpu_affinity()))
    assert sum(len(core) for core in found.cores) == psutil.cpu_count()


@pytest.mark.skipif(not Path("/sys/devices/system/node/node0").exists(), reason="the kernel shows no nodes")
def test_this_machine_has_the_nodes_that_the_kernel_lists() -> None:
    names = {f"node{node.id}" for node in Topology.here().nodes}
    assert names == {entry for entry in os.listdir("/sys/devices/system/node") if entry[4:].isdigit()}


def stand_on(monkeypatch: pytest.MonkeyPatch, root: Path, mask: list[int], nvml: list[Gpu] | None = None) -> Topology:
    monkeypatch.setattr(_here, "_ROOT", root)
    monkeypatch.setattr(_here, "read_mask", lambda: mask)
    monkeypatch.setattr(_here, "nvml_gpus", lambda: nvml)
    return Topology.here()


def test_mask_and_memory_of_the_cpuset_count(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    root = machine("0-7", nodes={0: "0-3", 1: "4-7"})
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text("Name:\tx\nMems_allowed:\t2\nMems_allowed_list:\t1\n")
    found = stand_on(monkeypatch, root, [2, 3, 4])
    assert found.allowed == (2, 3, 4)
    assert found.allowed_memory == (1,)


def test_a_machine_without_sysfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = stand_on(monkeypatch, tmp_path, [1, 2])
    assert not found.numa
    assert found.cores == ((0,), (1,), (2,), (3,))
    assert found.allowed == (1, 2)


def test_nvml_says_which_gpus_and_sysfs_where(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    root = machine(
        "0-3",
        nodes={0: "0-3", 1: {"kb": 8}},
        pci={
            "0000:17:00.0": {"numa_node": "0"},
            "0000:3d:00.0": {"numa_node": "0"},
            "0000:03:00.0": {"numa_node": "0", "vendor": "0x1002", "class": "0x038000"},
        },
        nvidia={"0000:17:00.0": ("GPU-1", "H200", None), "0000:3d:00.0": ("GPU-2", "H200", None)},
    )
    # The container was given the second GPU only, whose memory is node 1.
    found = stand_on(monkeypatch, root, [0], [Gpu("0000:3d:00.0", None, "GPU-2", 1, "H200")])
    assert found.gpus == (
        Gpu("0000:03:00.0", 0, vendor="amd"),
        Gpu("0000:17:00.0", 0, "GPU-1", None, "H200", usable=False),
        Gpu("0000:3d:00.0", 0, "GPU-2", 1, "H200"),
    )
    assert found.nodes[1].kind == "gpu"
    assert (found.visible, found.notes) == (("0000:3d:00.0",), ())


def test_without_nvml_the_driver_says_which_gpus(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    root = machine("0", nodes={0: "0"}, nvidia={"0000:17:00.0": ("GPU-1", "H200", None)})
    found = stand_on(monkeypatch, root, [0])
    assert [(gpu.uuid, gpu.node) for gpu in found.gpus] == [("GPU-1", 0)]
    assert found.visible == ("0000:17:00.0",)


def test_without_a_driver_cuda_shows_no_gpu(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    root = machine("0", pci={"0000:17:00.0": {"vendor": "0x10de", "class": "0x030200"}})
    found = stand_on(monkeypatch, root, [0])
    assert ([gpu.usable for gpu in found.gpus], found.visible) == ([False], ())


def test_the_environment_chooses_what_is_visible(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    addresses = ("0000:17:00.0", "0000:3d:00.0")
    root = machine("0", nodes={0: "0"}, nvidia={pci: (f"GPU-{i}", "H200", None) for i, pci in enumerate(addresses)})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert stand_on(monkeypatch, root, [0]).visible == addresses[::-1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    found = stand_on(monkeypatch, root, [0])
    assert found.visible == ()
    shown = "GPUs are left out: CUDA_VISIBLE_DEVICES = '0,0' shows none of 0000:17:00.0, 0000:3d:00.0"
    assert found.notes == (shown,)
    for on_purpose in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", on_purpose)
        found = stand_on(monkeypatch, root, [0])
        assert (found.visible, found.notes) == ((), ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7")
    found = stand_on(monkeypatch, root, [0])
    assert found.visible is None
    assert "GPU-7" in found.notes[0]


def test_a_quota_is_found(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    root = machine("0-3")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    assert stand_on(monkeypatch, root, [0, 1]).cpu_quota == 1.5

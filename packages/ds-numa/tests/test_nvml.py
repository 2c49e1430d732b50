from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ds_numa import Gpu
from ds_numa._nvml import nvml_gpus, nvml_mig_parent
from ds_numa.errors import GpuLookupError


class NVMLError(Exception):
    pass


def fake(**changes: Any) -> SimpleNamespace:
    """An NVML of two GPUs, the second of which is a NUMA node of its own; counts its sessions."""

    def numa_node(handle: int) -> int:
        if handle == 0:
            raise NVMLError("not supported")
        return 4

    def by_uuid(name: str) -> str:
        if name != "MIG-1":
            raise NVMLError("not found")
        return name

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        open=0,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetPciInfo=lambda handle: SimpleNamespace(busId=[b"00000000:17:00.0", "00000009:01:00.0"][handle]),
        nvmlDeviceGetUUID=lambda handle: [b"GPU-1", "GPU-2"][handle],
        nvmlDeviceGetName=lambda handle: [b"H200", "GH200"][handle],
        nvmlDeviceGetNumaNodeId=numa_node,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda handle: 1,
    )
    nvml.nvmlInit = lambda: setattr(nvml, "open", nvml.open + 1)
    nvml.nvmlShutdown = lambda: setattr(nvml, "open", nvml.open - 1)
    vars(nvml).update(changes)
    return nvml


def test_gpus_as_nvml_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert nvml_gpus() == [
        Gpu("0000:17:00.0", None, "GPU-1", None, "H200"),
        Gpu("0009:01:00.0", None, "GPU-2", 4, "GH200"),
    ]
    assert nvml.open == 0


def test_an_older_nvml_without_numa_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake()
    del nvml.nvmlDeviceGetNumaNodeId
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = nvml_gpus()
    assert found is not None
    assert [gpu.memory_node for gpu in found] == [None, None]


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails
    assert nvml_gpus() is None
    with pytest.raises(GpuLookupError, match=r"install ds-numa\[nvidia\]"):
        nvml_mig_parent("MIG-1")


def test_nvml_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise NVMLError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", fake(nvmlInit=no_driver))
    assert nvml_gpus() is None


def test_nvml_that_fails_half_way_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(handle: int) -> str:
        raise NVMLError("GPU is lost")

    nvml = fake(nvmlDeviceGetUUID=lost)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert nvml_gpus() is None
    assert nvml.open == 0


def test_parents_of_mig_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake())
    assert nvml_mig_parent("MIG-1") == "00000009:01:00.0"
    with pytest.raises(GpuLookupError, match="'MIG-9' is unknown to NVML"):
        nvml_mig_parent("MIG-9")

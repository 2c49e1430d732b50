"""What NVML says about the GPUs; used when ``nvidia-ml-py`` is installed and a driver answers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ds_numa._gpus import normalise_pci
from ds_numa.errors import GpuLookupError
from ds_numa.topology import Gpu

logger = logging.getLogger("ds.numa")


def nvml_gpus() -> list[Gpu] | None:
    """The GPUs that NVML shows, without the node they hang on (that is sysfs' to say); None without NVML."""
    with _session() as nvml:
        if nvml is None:
            return None
        try:
            return [_describe(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            logger.debug("NVML cannot list the GPUs: %s", error)
            return None


def nvml_mig_parent(name: str) -> str:
    """The PCI address of the GPU that a ``MIG-`` device is cut from.

    Raises:
        GpuLookupError: NVML is not installed, does not answer or does not know the name.
    """
    with _session() as nvml:
        if nvml is None:
            raise GpuLookupError(f"{name!r} can only be placed by NVML: install ds-numa[nvidia], or pass devices=")
        try:
            parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(name))
            return _text(nvml.nvmlDeviceGetPciInfo(parent).busId)
        except nvml.NVMLError as error:
            raise GpuLookupError(f"{name!r} is unknown to NVML ({error}): take a name from nvidia-smi -L") from None


def nvml_users() -> dict[int, list[str]]:
    """The PCI addresses of the GPUs on which each process computes, by its process number; empty without NVML."""
    users: dict[int, list[str]] = {}
    with _session() as nvml:
        if nvml is None:
            return users
        with contextlib.suppress(nvml.NVMLError):
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                pci = normalise_pci(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    users.setdefault(int(process.pid), []).append(pci)
    return users


@contextlib.contextmanager
def _session() -> Iterator[Any]:
    nvml = _load()
    try:
        yield nvml
    finally:
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()


def _load() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:  # no driver, or none that answers
        logger.debug("NVML does not start: %s", error)
        return None
    module: ModuleType = pynvml
    return module


def _describe(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory_node = None
    with contextlib.suppress(nvml.NVMLError, AttributeError):  # only where GPUs are NUMA nodes, and in recent NVML
        memory_node = int(nvml.nvmlDeviceGetNumaNodeId(handle))
    return Gpu(
        pci=normalise_pci(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        memory_node=memory_node,
        model=_text(nvml.nvmlDeviceGetName(handle)),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value

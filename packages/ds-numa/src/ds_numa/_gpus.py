"""Which GPUs there are, and which of them the ranks of a job will use, by PCI address.

[Note: GPU indices] There are two numberings. The driver (NVML, ``nvidia-smi``) counts all GPUs of the machine by PCI
address. CUDA counts those in ``CUDA_VISIBLE_DEVICES``, in the order given there: ``cuda:2`` is the third entry. The PCI
address is the same in both, so everything here is keyed by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ds_numa._files import read_text
from ds_numa.errors import GpuLookupError
from ds_numa.topology import Gpu

_PCI = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_OTHER_VENDORS = ("0x1002", "0x8086")  # AMD, Intel; NVIDIA's GPUs are listed by its driver
_GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # VGA, 3D, display, processing accelerator


def normalise_pci(text: str) -> str:
    """A PCI address as sysfs writes it.

    >>> normalise_pci("00000000:C1:00.0"), normalise_pci("c1:00.0")
    ('0000:c1:00.0', '0000:c1:00.0')
    """
    match = _PCI.fullmatch(text.strip().lower())
    if not match:
        raise GpuLookupError(f"pci = {text!r} is not a PCI address: write one such as 0000:c1:00.0")
    domain, bus, device, function = match.groups(default="0")
    return f"{int(domain, 16):04x}:{bus}:{device}.{function}"


def read_gpus(root: Path) -> tuple[Gpu, ...]:
    """GPUs by ascending PCI address: NVIDIA's that the driver shows, AMD's and Intel's that are on the bus."""
    driver, bus = root / "proc/driver/nvidia/gpus", root / "sys/bus/pci/devices"
    gpus = []
    for folder in driver.iterdir() if driver.is_dir() else ():
        facts = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", read_text(folder / "information"), re.MULTILINE))
        status = re.match(r"Node:\s*(\d+)", read_text(folder / "numa_status"))
        pci = normalise_pci(folder.name)
        gpus.append(
            Gpu(
                pci=pci,
                node=pci_node(root, pci),
                uuid=facts.get("GPU UUID") or "",
                memory_node=int(status[1]) if status else None,
                model=facts.get("Model") or None,
            )
        )
    for folder in bus.iterdir() if bus.is_dir() else ():
        if read_text(folder / "vendor") in _OTHER_VENDORS and read_text(folder / "class")[:6] in _GPU_CLASSES:
            gpus.append(Gpu(pci=folder.name, node=pci_node(root, folder.name)))
    return tuple(sorted(gpus, key=lambda gpu: pci_order(gpu.pci)))


def pci_node(root: Path, pci: str) -> int | None:
    """The NUMA node that a PCI device hangs on; None where the kernel does not know it (it writes -1)."""
    text = read_text(root / f"sys/bus/pci/devices/{pci}/numa_node")
    return int(text) if text.isdecimal() else None


def visible_gpus(
    gpus: Sequence[Gpu],
    env: Mapping[str, str],
    *,
    mig_parent: Callable[[str], str] | None = None,
) -> list[Gpu]:
    """The NVIDIA GPUs that CUDA will show, in CUDA's order: entry i is ``cuda:i``.

    Args:
        gpus: all GPUs of the machine.
        env: the environment; ``CUDA_VISIBLE_DEVICES`` (numbers, ``GPU-`` or ``MIG-`` names) and ``CUDA_DEVICE_ORDER``.
        mig_parent: gives the PCI address of the GPU that a ``MIG-`` name is cut from.

    Returns:
        One GPU for each visible device. As in CUDA, the list ends before the first number that names no GPU.

    Raises:
        GpuLookupError: a name is unknown or fits several GPUs, or numbers mean nothing because the machine has
            different models and CUDA orders them by speed.
    """
    nvidia = sorted((gpu for gpu in gpus if gpu.uuid is not None), key=lambda gpu: pci_order(gpu.pci))
    value = env.get("CUDA_VISIBLE_DEVICES")
    entries = [str(i) for i in range(len(nvidia))] if value is None else [entry.strip() for entry in value.split(",")]
    found: list[Gpu] = []
    for entry in entries:
        if entry.isascii() and entry.isdecimal() and int(entry) < len(nvidia):
            _check_numbers_mean_something(nvidia, env)
            found.append(nvidia[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")):
            found.append(_by_name(nvidia, entry, mig_parent))
        else:
            break
    return found


def _check_numbers_mean_something(nvidia: Sequence[Gpu], env: Mapping[str, str]) -> None:
    models = sorted({gpu.model or "?" for gpu in nvidia})
    if len(models) > 1 and env.get("CUDA_DEVICE_ORDER", "").strip() != "PCI_BUS_ID":
        raise GpuLookupError(
            f"CUDA_DEVICE_ORDER = {env.get('CUDA_DEVICE_ORDER')!r} lets CUDA number the models {models} by speed, "
            "which only CUDA knows: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _by_name(nvidia: Sequence[Gpu], entry: str, mig_parent: Callable[[str], str] | None) -> Gpu:
    """The GPU of a ``GPU-`` name, which may be shortened, or the one that a ``MIG-`` device is cut from."""
    known = ", ".join(gpu.uuid or "?" for gpu in nvidia) or "none"
    old_style = re.match(r"MIG-(GPU-[0-9a-f-]+)", entry)  # MIG-GPU-<uuid>/<instance>/<instance>
    if entry.startswith("MIG-") and not old_style:
        if mig_parent is None:
            raise GpuLookupError(
                f"CUDA_VISIBLE_DEVICES has {entry!r}, which only NVML can place: install ds-numa[nvidia], or pass gpus="
            )
        pci = normalise_pci(mig_parent(entry))
        matches = [gpu for gpu in nvidia if gpu.pci == pci]
    else:
        name = old_style[1] if old_style else entry
        matches = [gpu for gpu in nvidia if (gpu.uuid or "").lower().startswith(name.lower())]
    if len(matches) != 1:
        raise GpuLookupError(
            f"CUDA_VISIBLE_DEVICES has {entry!r}, which fits {len(matches)} GPUs: name exactly one of {known}"
        )
    return matches[0]


def pci_order(pci: str) -> tuple[int, ...]:
    """A key that sorts PCI addresses as NVML does."""
    return tuple(int(part, 16) for part in re.split(r"[:.]", pci))

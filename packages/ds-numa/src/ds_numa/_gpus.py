"""Which GPUs the ranks of a job will use, by PCI address.

[Note: GPU indices] There are two numberings. The driver (NVML, ``nvidia-smi``) counts all GPUs of the machine by PCI
address. CUDA counts those in ``CUDA_VISIBLE_DEVICES``, in the order given there: ``cuda:2`` is the third entry. The PCI
address is the same in both, so everything here is keyed by it. AMD and Intel have the same two numberings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ds_numa.errors import GpuLookupError
from ds_numa.topology import Gpu, Vendor

_PCI = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_ORDER: tuple[Vendor, ...] = ("nvidia", "amd", "intel")
_CHOICES = (
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
    "ONEAPI_DEVICE_SELECTOR",
)
_NONE_ON_PURPOSE = ("", "-1", "NoDevFiles")


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


def is_pci(text: str) -> bool:
    """Whether this is a PCI address as sysfs writes it."""
    return _PCI.fullmatch(text) is not None


def pci_order(pci: str) -> tuple[int, ...]:
    """A key that sorts PCI addresses as NVML does."""
    return tuple([int(part, 16) for part in pci.replace(".", ":").split(":")])


def visible_gpus(
    gpus: Sequence[Gpu],
    env: Mapping[str, str],
    *,
    mig_parent: Callable[[str], str] | None = None,
) -> list[Gpu]:
    """The GPUs that the vendor's runtime will show, in its order: entry i is ``cuda:i`` (or ``xpu:i``).

    On a machine with GPUs of several vendors these are NVIDIA's, else AMD's, else Intel's.

    Args:
        gpus: all GPUs of the machine; those that are not usable do not count.
        env: the environment. NVIDIA: ``CUDA_VISIBLE_DEVICES`` (numbers, ``GPU-`` or ``MIG-`` names) and
            ``CUDA_DEVICE_ORDER``. AMD: ``ROCR_VISIBLE_DEVICES``, then ``HIP_VISIBLE_DEVICES`` or
            ``CUDA_VISIBLE_DEVICES``. Intel: ``ZE_FLAT_DEVICE_HIERARCHY``, ``ZE_AFFINITY_MASK`` and
            ``ONEAPI_DEVICE_SELECTOR``.
        mig_parent: gives the PCI address of the GPU that a ``MIG-`` name is cut from.

    Returns:
        One GPU for each visible device, so a GPU that is cut into parts (MIG, partitions, tiles) may come several
        times. As in CUDA, the list ends before the first entry that names no GPU, and is empty where an entry is
        repeated.

    Raises:
        GpuLookupError: a name fits several GPUs or cannot be compared; the first name fits none, so that CUDA shows
            none at all; or numbers mean nothing because the machine has different models and CUDA orders them by speed.
    """
    usable = sorted((gpu for gpu in gpus if gpu.usable), key=lambda gpu: pci_order(gpu.pci))
    vendor = next((vendor for vendor in _ORDER if any(gpu.vendor == vendor for gpu in usable)), None)
    own = [gpu for gpu in usable if vendor and gpu.vendor == vendor]
    if vendor == "nvidia":
        return _cuda_devices(own, env, mig_parent)
    if vendor == "amd":
        from ds_numa._visible import hip_devices

        return hip_devices(own, env)
    if vendor == "intel":
        from ds_numa._visible import level_zero_devices

        return level_zero_devices(own, env)
    return []


def hidden_notes(gpus: Sequence[Gpu], env: Mapping[str, str]) -> tuple[str, ...]:
    """What to say where `visible_gpus` finds none; nothing on a machine without GPUs, or where a choice is for none."""
    usable = [gpu.pci for gpu in gpus if gpu.usable]
    chosen = {name: env[name] for name in _CHOICES if name in env}
    if not usable or any(value.strip() in _NONE_ON_PURPOSE for value in chosen.values()):
        return ()
    if not chosen:
        return (f"GPUs are left out: the vendor of {', '.join(usable)} is not known: pass devices=",)
    choice = ", ".join(f"{name} = {value!r}" for name, value in chosen.items())
    return (f"GPUs are left out: {choice} shows none of {', '.join(usable)}",)


def _cuda_devices(nvidia: Sequence[Gpu], env: Mapping[str, str], mig_parent: Callable[[str], str] | None) -> list[Gpu]:
    """What CUDA shows.

    Source: "CUDA Environment Variables" of the CUDA programming guide; what it leaves open was measured with driver
    580.159 on an H200. The first entry decides whether the list holds numbers or names; an entry of the other sort ends
    it. White space may stand before a number, not before a name. Text after a number's digits is ignored. A GPU that is
    named twice makes CUDA fail (CUDA_ERROR_INVALID_DEVICE), so that it shows none.
    """
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        _check_numbers_mean_something(nvidia, env)
        return list(nvidia)
    sort = next((prefix for prefix in ("GPU-", "MIG-") if value.startswith(prefix)), "")
    found: list[Gpu] = []
    seen = set()
    for entry in value.split(","):
        gpu = _by_name(nvidia, entry, sort, mig_parent) if sort else _by_number(nvidia, entry, env)
        if gpu is None and sort and not found:
            known = ", ".join(gpu.uuid or "?" for gpu in nvidia)
            raise GpuLookupError(f"CUDA_VISIBLE_DEVICES has {entry!r}, which fits 0 GPUs: name exactly one of {known}")
        if gpu is None:
            break
        # Several MIG devices of one GPU are legal; the same one twice is not.
        key = entry.strip() if sort == "MIG-" else gpu.pci
        if key in seen:
            return []
        seen.add(key)
        found.append(gpu)
    return found


def _by_number(nvidia: Sequence[Gpu], entry: str, env: Mapping[str, str]) -> Gpu | None:
    match = re.match(r"\s*[+-]?(\d+)", entry, re.ASCII)
    if not match or int(match[1]) >= len(nvidia) or (entry.lstrip().startswith("-") and int(match[1])):
        return None
    _check_numbers_mean_something(nvidia, env)
    return nvidia[int(match[1])]


def _check_numbers_mean_something(nvidia: Sequence[Gpu], env: Mapping[str, str]) -> None:
    models = sorted({gpu.model or "?" for gpu in nvidia})
    if len(models) > 1 and env.get("CUDA_DEVICE_ORDER", "").strip() != "PCI_BUS_ID":
        raise GpuLookupError(
            f"CUDA_DEVICE_ORDER = {env.get('CUDA_DEVICE_ORDER')!r} lets CUDA number the models {models} by speed, "
            "which only CUDA knows: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _by_name(nvidia: Sequence[Gpu], entry: str, sort: str, mig_parent: Callable[[str], str] | None) -> Gpu | None:
    """The GPU of a ``GPU-`` name, which may be shortened, or the one that a ``MIG-`` device is cut from."""
    name = entry.rstrip()
    if not name.startswith(sort) or name == sort:
        return None
    old_style = re.match(r"MIG-(GPU-[0-9A-Fa-f-]+)", name)  # MIG-GPU-<uuid>/<instance>/<instance>
    if sort == "MIG-" and not old_style:
        if mig_parent is None:
            raise GpuLookupError(
                f"CUDA_VISIBLE_DEVICES has {name!r}, which only NVML can place: install ds-numa[nvidia], "
                "or pass devices="
            )
        pci = normalise_pci(mig_parent(name))
        matches = [gpu for gpu in nvidia if gpu.pci == pci]
    else:
        wanted = (old_style[1] if old_style else name).lower()
        uuids = [(gpu, (gpu.uuid or "").lower()) for gpu in nvidia]
        matches = [gpu for gpu, uuid in uuids if uuid and (uuid.startswith(wanted) or wanted.startswith(uuid))]
        if not matches and not all(uuid for _, uuid in uuids):
            raise GpuLookupError(
                f"CUDA_VISIBLE_DEVICES has {name!r}, but the driver does not tell the names of all GPUs: use numbers"
            )
    if len(matches) > 1:
        known = ", ".join(gpu.uuid or "?" for gpu in nvidia)
        raise GpuLookupError(
            f"CUDA_VISIBLE_DEVICES has {name!r}, which fits {len(matches)} GPUs: name exactly one of {known}"
        )
    return matches[0] if matches else None

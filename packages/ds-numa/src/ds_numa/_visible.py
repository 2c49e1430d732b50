"""Which GPUs AMD's and Intel's runtimes show, by the environment variables that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ds_numa.errors import GpuLookupError
from ds_numa.topology import Gpu


def _parts(gpus: Sequence[Gpu]) -> list[Gpu]:
    """One entry for each device of the runtime, in its order; by PCI address where the order is not known."""
    if not all(gpu.ordinals for gpu in gpus):
        return [gpu for gpu in gpus for _ in gpu.ordinals or (0,)]
    return [gpu for _, gpu in sorted(((number, gpu) for gpu in gpus for number in gpu.ordinals), key=lambda e: e[0])]


def hip_devices(gpus: Sequence[Gpu], env: Mapping[str, str]) -> list[Gpu]:
    """What HIP shows: the choice of ``ROCR_VISIBLE_DEVICES``, and from that the choice of ``HIP_VISIBLE_DEVICES``.

    Source: "GPU isolation techniques" of the ROCm documentation; for what it leaves open, the behaviour of
    amd_filter_device.cpp (ROCR-Runtime) and rocdevice.cpp (clr). ROCR ends the list before the first entry that is
    invalid or repeated. HIP ends it before the first invalid one and counts a repeated one once; an empty
    ``HIP_VISIBLE_DEVICES`` is as good as none, and then ``CUDA_VISIBLE_DEVICES`` counts.

    Raises:
        GpuLookupError: a name may mean a part of a partitioned GPU, or ``GPU_DEVICE_ORDINAL`` would change the choice,
            of which documentation (it does) and runtime (OpenCL alone) differ.
    """
    devices = _parts(gpus)
    rocr = env.get("ROCR_VISIBLE_DEVICES")
    if rocr is not None:
        chosen: list[int] = []
        for entry in rocr.split(",")[: len(devices)]:
            index = _hip_index(devices, entry.strip(), "ROCR_VISIBLE_DEVICES", lambda text: int(text, 0))
            if index is None or index in chosen:
                break
            chosen.append(index)
        devices = [devices[index] for index in chosen]
    name = "HIP_VISIBLE_DEVICES" if env.get("HIP_VISIBLE_DEVICES") else "CUDA_VISIBLE_DEVICES"
    shown = _hip_filter(devices, env.get(name), name)
    ordinal = env.get("GPU_DEVICE_ORDINAL")
    if ordinal and _hip_filter(devices, ordinal, "GPU_DEVICE_ORDINAL") != shown:
        raise GpuLookupError(
            f"GPU_DEVICE_ORDINAL = {ordinal!r} selects other GPUs than {name} = {env.get(name)!r}, and AMD's runtimes "
            "do not all read it: set HIP_VISIBLE_DEVICES alone"
        )
    return shown


def _hip_filter(devices: list[Gpu], value: str | None, variable: str) -> list[Gpu]:
    if not value:
        return devices
    chosen: dict[int, None] = {}
    for entry in value.split(","):
        index = _hip_index(devices, entry, variable, _plain_number)
        if index is None:
            break
        chosen[index] = None
    return [devices[index] for index in chosen]


def _plain_number(text: str) -> int:
    number = int(text)
    if str(number) != text:  # HIP reads "1" and neither "01" nor " 1"
        raise ValueError(text)
    return number


def _hip_index(devices: Sequence[Gpu], entry: str, variable: str, read: Callable[[str], int]) -> int | None:
    """Which device an entry means; None for one that is invalid."""
    if entry.upper().startswith("GPU-"):
        wanted = entry.lower()
        matches = [i for i, gpu in enumerate(devices) if (gpu.uuid or "").lower().startswith(wanted)]
        partitioned = len({gpu.pci for gpu in devices}) < len(devices)
        if partitioned or (not matches and not all(gpu.uuid for gpu in devices)):
            raise GpuLookupError(
                f"{variable} has {entry!r}, and the driver does not tell the names of all GPUs and their parts: "
                "use numbers"
            )
        return matches[0] if len(matches) == 1 and len(wanted) > 4 else None
    try:
        index = read(entry)
    except ValueError:
        return None
    return index if 0 <= index < len(devices) else None


def level_zero_devices(gpus: Sequence[Gpu], env: Mapping[str, str]) -> list[Gpu]:
    """What Level Zero shows to SYCL (``xpu:0`` and so on), in order of PCI address.

    Source: "Affinity Mask" and "Device Hierarchy" of the Level Zero core programming guide; "ONEAPI_DEVICE_SELECTOR" of
    the DPC++ environment variables. Both variables choose; neither changes the order.

    Raises:
        GpuLookupError: a value cannot be read, or chooses tiles in a way that only the runtime resolves.
    """
    hierarchy = env.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").strip().upper() or "FLAT"
    flat = hierarchy != "COMPOSITE"
    tiles = {gpu.pci: len(gpu.ordinals) or 1 for gpu in gpus}
    devices = [gpu for gpu in gpus for _ in range(tiles[gpu.pci] if flat else 1)]
    mask = env.get("ZE_AFFINITY_MASK", "").strip()
    if mask and mask.lower() != "default":
        chosen = set()
        for entry in mask.split(","):
            root, dot, tile = entry.strip().partition(".")
            if not root.isdecimal() or (dot and not tile.isdecimal()):
                raise GpuLookupError(f"ZE_AFFINITY_MASK = {mask!r}: {entry!r} is no device such as 0 or 0.1")
            if dot and flat and len(devices) != len(gpus):
                raise GpuLookupError(
                    f"ZE_AFFINITY_MASK = {mask!r} names a tile of a device that is a tile already: "
                    "set ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE, or name tiles by one number"
                )
            chosen.add(int(root))
        devices = [gpu for index, gpu in enumerate(devices) if index in chosen]
    selector = env.get("ONEAPI_DEVICE_SELECTOR", "").strip()
    return _select(devices, selector) if selector else devices


def _select(devices: list[Gpu], selector: str) -> list[Gpu]:
    terms = [term.strip().lower() for term in selector.split(";") if term.strip()]
    wanted = [_term(term, selector, len(devices)) for term in terms if not term.startswith("!")]
    refused = [_term(term[1:], selector, len(devices)) for term in terms if term.startswith("!")]
    chosen = set().union(*wanted) if wanted else set(range(len(devices)))
    chosen = chosen.difference(*refused)
    return [gpu for index, gpu in enumerate(devices) if index in chosen]


def _term(term: str, selector: str, count: int) -> set[int]:
    """The Level Zero GPUs that one term such as ``level_zero:0,1`` or ``*:gpu`` names."""
    backend, colon, listed = term.partition(":")
    if not colon or not listed:
        raise GpuLookupError(
            f"ONEAPI_DEVICE_SELECTOR = {selector!r}: {term!r} is no term such as level_zero:0,1 or *:gpu"
        )
    if backend not in ("*", "level_zero"):
        return set()
    found: set[int] = set()
    for device in (part.strip() for part in listed.split(",")):
        if device in ("*", "gpu"):
            found.update(range(count))
        elif device.isdecimal():
            found.add(int(device))
        elif device not in ("cpu", "fpga", "acc"):
            raise GpuLookupError(
                f"ONEAPI_DEVICE_SELECTOR = {selector!r} selects {device!r}, which only the runtime can resolve: "
                "name whole devices, such as level_zero:0,1"
            )
    return found

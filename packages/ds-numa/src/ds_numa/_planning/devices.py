"""Which device each rank of a plan uses, by PCI address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from ds_numa._gpus import normalise_pci
from ds_numa.errors import GpuLookupError, PlanError
from ds_numa.topology import Topology

Devices = Sequence[str | None] | Literal["auto"] | None
UNSET: Final = "unset"  # the default of an older argument, whose None means something


def resolve_devices(
    topology: Topology, ranks: int, devices: Devices, gpus: Devices | Literal["unset"], notes: list[str]
) -> list[str | None]:
    """The device of each rank, or None for a rank without.

    Args:
        topology: the machine.
        ranks: how many ranks.
        devices: ``"auto"``: rank i uses the i-th device that the job sees. None: no rank uses one. Else a list.
        gpus: the older name of `devices`, or `UNSET`.
        notes: where to say that devices are left out.

    Raises:
        GpuLookupError: the list has the wrong length or names a device that the machine does not have.
        PlanError: both `devices` and `gpus` are given.
    """
    argument = "devices"
    if gpus != UNSET:
        if devices != "auto":
            raise PlanError(f"devices = {devices!r} and gpus = {gpus!r} mean the same: give devices= alone")
        argument, devices = "gpus", gpus
    if devices is None:
        return [None] * ranks
    if isinstance(devices, str):
        if devices != "auto":
            raise GpuLookupError(
                f"{argument} = {devices!r} must be 'auto', None or list one PCI address (or None) for each rank"
            )
        found = visible_devices(topology)
        if found and len(found) < ranks:
            notes.append(
                f"devices are left out: {ranks} ranks see {len(found)}, so which rank uses which is unknown: "
                "pass devices="
            )
        if len(found) < ranks:
            return [None] * ranks
        return list(found[:ranks])
    if len(devices) != ranks:
        raise GpuLookupError(
            f"{argument} = {list(devices)!r} must list one PCI address (or None) for each of the {ranks} ranks"
        )
    known = {gpu.pci for gpu in topology.gpus}
    addresses = [None if pci is None else normalise_pci(pci) for pci in devices]
    strays = [pci for pci in addresses if pci is not None and pci not in known]
    if strays:
        raise GpuLookupError(
            f"{argument} names {strays}, which this machine does not have: choose from {sorted(known)}"
        )
    return addresses


def visible_devices(topology: Topology) -> list[str]:
    """The devices that a job sees, in its order: those of the environment, else the usable ones of one vendor.

    Raises:
        GpuLookupError: the topology says that a device is visible which it does not hold.
    """
    if topology.visible is not None:
        strays = set(topology.visible).difference(gpu.pci for gpu in topology.gpus)
        if strays:
            raise GpuLookupError(
                f"topology.visible names {sorted(strays)}, which are not among topology.gpus: add them"
            )
        return list(topology.visible)
    usable = [gpu for gpu in topology.gpus if gpu.usable]
    for vendor in ("nvidia", "amd", "intel", None):
        mine = [gpu.pci for gpu in usable if gpu.vendor == vendor]
        if mine:
            return mine
    return []


def find_seats(topology: Topology, addresses: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """All devices that the job sees, used or not, and by rank the position of its own (-1 for a rank without).

    A device that several ranks use, or that the job does not see, takes as many positions as it has ranks.
    """
    used = {pci for pci in addresses if pci is not None}
    seats = visible_devices(topology)
    if topology.visible is None:  # ranks may use another vendor's devices than "auto" would
        vendors = {gpu.vendor for gpu in topology.gpus if gpu.pci in used}
        seats = [gpu.pci for gpu in topology.gpus if gpu.usable and gpu.vendor in vendors]
    positions: dict[str, list[int]] = {}
    for position, pci in enumerate(seats):
        positions.setdefault(pci, []).append(position)
    seat_of = []
    for address in addresses:
        if address is None:
            seat_of.append(-1)
        elif positions.get(address):
            seat_of.append(positions[address].pop(0))
        else:
            seat_of.append(len(seats))
            seats.append(address)
    return seats, seat_of

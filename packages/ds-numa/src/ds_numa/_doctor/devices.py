"""Which GPU and which network cards a running rank uses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ds_numa._doctor.jobs import RankProcess
from ds_numa._gpus import visible_gpus
from ds_numa._nvml import nvml_mig_parent, nvml_users
from ds_numa._ranges import format_ranges
from ds_numa.errors import GpuLookupError
from ds_numa.topology import Topology

_MOST_CARDS = 4  # named in a verdict


def gpus_of_ranks(machine: Topology, ranks: Sequence[RankProcess]) -> tuple[list[str | None], list[str]]:
    """The PCI address of each rank's GPU, and notes on those that cannot be told.

    NVML names the processes on each GPU. It is believed where its process numbers are this process's (a container may
    be told those of the host) and it names one GPU that the rank sees. Elsewhere the rank's environment and its local
    rank tell.
    """
    users = nvml_users() if _host_process_numbers() else {}
    found: list[str | None] = []
    notes, guessed = [], []
    for rank in ranks:
        used = users.get(rank.pid, [])
        try:
            visible = [gpu.pci for gpu in visible_gpus(machine.gpus, rank.environ, mig_parent=nvml_mig_parent)]
        except GpuLookupError as error:
            if len(used) != 1:
                notes.append(f"rank {rank.local_rank}: its GPU cannot be told: {error}")
            found.append(used[0] if len(used) == 1 else None)
            continue
        if len(used) == 1 and used[0] in visible:
            found.append(used[0])
            continue
        index = 0 if len(visible) == 1 else rank.local_rank
        found.append(visible[index] if index < len(visible) else None)
        guessed += [rank.local_rank] if found[-1] else []
    if guessed:
        who = f"rank{'s' if len(guessed) > 1 else ''} {format_ranges(guessed)}"
        notes.append(f"NVML names no process of {who}: its GPU is taken from its environment and local rank")
    return found, notes


def _host_process_numbers() -> bool:
    """Whether this process lives in the first namespace of process numbers, in which the driver counts.

    Source: the kernel's include/linux/proc_ns.h, PROC_PID_INIT_INO.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
    except OSError:
        return False


def near_cards(machine: Topology, gpu: str | None, cpus: Sequence[int]) -> str:
    """The cards nearest to a rank's GPU, or to its CPUs where it has none, in words.

    Empty where no card has a node, or where the machine has one node alone, to which all are near.
    """
    homes = [device.node for device in machine.gpus if device.pci == gpu and device.node is not None]
    homes = homes or [node.id for node in machine.nodes if not set(cpus).isdisjoint(node.cpus)]
    cards = [(card, card.node) for card in machine.nics if card.node is not None]
    if not homes or not cards or len(machine.nodes) == 1:
        return ""
    reach = min(machine.distance(home, node) for home in homes for _, node in cards)
    near = [(card, node) for card, node in cards if any(machine.distance(home, node) == reach for home in homes)]
    names = ", ".join("/".join(card.names) or card.pci for card, _ in near[:_MOST_CARDS])
    more = f" and {len(near) - _MOST_CARDS} more" if len(near) > _MOST_CARDS else ""
    nodes = sorted({node for _, node in near})
    far = "" if any(same_socket(machine, home, node) for home in homes for node in nodes) else ", of another socket"
    return f"nearest network card: {names}{more} on node {format_ranges(nodes)}{far}"


def far_cards(machine: Topology, gpu: str | None, environ: Mapping[str, str]) -> str | None:
    """What is wrong with the cards that ``NCCL_IB_HCA`` names for a rank, or None.

    Source: NCCL's documentation of ``NCCL_IB_HCA``: names or prefixes, ``=`` for exact names, ``^`` to leave out, and a
    port behind a colon.
    """
    value = environ.get("NCCL_IB_HCA", "")
    home = next((device.node for device in machine.gpus if device.pci == gpu), None)
    if not value or home is None:
        return None
    exact, left_out = "=" in value[:2], value.startswith("^")
    listed = [entry.partition(":")[0] for entry in value.lstrip("^=").split(",") if entry]

    def named(names: Sequence[str]) -> bool:
        hit = any(name == entry if exact else name.startswith(entry) for name in names for entry in listed)
        return hit != left_out

    cards = [card for card in machine.nics if card.names and card.node is not None]
    used = [card for card in cards if named(card.names)]
    near = [card for card in cards if card.node is not None and same_socket(machine, card.node, home)]
    if not used or not near or set(used) & set(near):
        return None
    nodes = format_ranges(card.node for card in used if card.node is not None)
    return f"NCCL_IB_HCA = {value} names cards of node {nodes}, but its GPU hangs on node {home}, near " + ", ".join(
        "/".join(card.names) for card in near
    )


def same_socket(machine: Topology, a: int, b: int) -> bool:
    """Whether two nodes share a socket; where the machine tells no sockets, whether they are one node."""
    return a == b or not set(machine.sockets_of(a)).isdisjoint(machine.sockets_of(b))

"""Which GPU and which network cards a running rank uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_numa._doctor.jobs import RankProcess
from ds_numa._gpus import visible_gpus
from ds_numa._nvml import nvml_mig_parent, nvml_users
from ds_numa._ranges import format_ranges
from ds_numa.errors import GpuLookupError
from ds_numa.topology import Topology


def gpus_of_ranks(machine: Topology, ranks: Sequence[RankProcess]) -> tuple[list[str | None], list[str]]:
    """The PCI address of each rank's GPU, and notes on those that cannot be told.

    NVML names the processes on each GPU; where it does not (a container has other process numbers) the rank's own
    environment and its local rank tell.
    """
    users = nvml_users()
    found: list[str | None] = []
    notes = []
    for rank in ranks:
        used = users.get(rank.pid, [])
        if len(used) == 1:
            found.append(used[0])
            continue
        try:
            visible = visible_gpus(machine.gpus, rank.environ, mig_parent=nvml_mig_parent)
        except GpuLookupError as error:
            notes.append(f"rank {rank.local_rank}: its GPU cannot be told: {error}")
            found.append(None)
            continue
        index = 0 if len(visible) == 1 else rank.local_rank
        found.append(visible[index].pci if index < len(visible) else None)
    return found, notes


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

"""The modes that follow one device at a time: a whole node, socket or cache for each rank, or a slice of the node.

Source: the rules are those of ``torch.numa.binding`` (``NODE``, ``SOCKET``, ``CORE_COMPLEX`` and ``EXCLUSIVE`` of
``AffinityMode``), so that ``torchrun --numa-binding`` and a plan give a rank the same CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_numa._planning.layout import Core, Layout
from ds_numa._words import count
from ds_numa.errors import NotEnoughCoresError


def place_whole(
    layout: Layout,
    mode: str,
    homes: Sequence[int | None],
    seats: Sequence[int | None] = (),
    seat_of: Sequence[int] = (),
) -> list[list[Core]]:
    """A whole node, socket or last-level cache for each rank; ranks may share one.

    Args:
        layout: the cores.
        mode: ``"node"``, ``"socket"`` or ``"l3"``.
        homes: by rank, a node with cores, or None: these ranks are spread evenly over all nodes, sockets or caches.
        seats: the home of each device that the job sees, in the order of the job's numbering; only for ``"l3"``.
        seat_of: by rank, the position of its device in `seats`; likewise.
    """
    everything = _groups(layout, mode)
    shares = []
    for rank, home in enumerate(homes):
        if home is None:
            shares.append(everything[rank * len(everything) // len(homes)])
        elif mode == "node":
            shares.append(layout.by_node[home])
        elif mode == "socket":
            shares.append([core for core in layout.row if layout.domain.get(core.node) == layout.domain.get(home)])
        else:
            caches = _by_cache(layout.by_node[home])
            caches.sort(key=lambda cores: (-sum(len(core.cpus) for core in cores), cores[0].l3))
            shares.append(caches[seats[: seat_of[rank]].count(home) % len(caches)])
    return shares


def place_exclusive(
    layout: Layout, homes: Sequence[int | None], seats: Sequence[int | None], seat_of: Sequence[int]
) -> list[list[Core]]:
    """A slice of the home node for each rank: its cores are divided among all devices there, used or not.

    Args:
        layout: the cores.
        homes: see `place_whole`; a rank without is given a node in turn, and counts as a device there.
        seats: see `place_whole`.
        seat_of: see `place_whole`.

    Raises:
        NotEnoughCoresError: a rank's node has fewer cores than devices.
    """
    nodes = list(layout.by_node)
    all_seats = list(seats)
    mine = list(seat_of)
    for rank, home in enumerate(homes):
        if home is None:
            mine[rank] = len(all_seats)
            all_seats.append(nodes[rank * len(nodes) // len(homes)])
    shares = []
    for seat in mine:
        node = all_seats[seat]
        cores = sorted(layout.by_node[node], key=lambda core: core.number)
        each, larger = divmod(len(cores), all_seats.count(node))
        if each == 0:
            raise NotEnoughCoresError(
                f"mode = 'exclusive' divides the {count(len(cores), 'usable core')} of node {node} among the "
                f"{all_seats.count(node)} GPUs or ranks there: start fewer, allow more CPUs or use mode='auto'"
            )
        before = all_seats[:seat].count(node)
        start = before * each + min(before, larger)
        shares.append(cores[start : start + each + (before < larger)])
    return shares


def _groups(layout: Layout, mode: str) -> list[list[Core]]:
    """All nodes, sockets or caches, in the order of the row."""
    if mode == "node":
        return list(layout.by_node.values())
    if mode == "l3":
        return [cache for block in layout.by_node.values() for cache in _by_cache(block)]
    sockets: dict[tuple[int, int | None], list[Core]] = {}
    for core in layout.row:
        key = (core.socket, layout.domain.get(core.node) if core.socket < 0 else None)
        sockets.setdefault(key, []).append(core)
    return list(sockets.values())


def _by_cache(cores: Iterable[Core]) -> list[list[Core]]:
    caches: dict[int, list[Core]] = {}
    for core in cores:
        caches.setdefault(core.l3, []).append(core)
    return list(caches.values())

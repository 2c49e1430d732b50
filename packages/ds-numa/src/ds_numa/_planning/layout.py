"""Where the cores that are dealt out lie: in which node, socket and last-level cache, and how far from each other.

[Note: socket domain] A rank should not leave the socket of its device, but the kernel gives a device's *node*. A socket
domain is the set of nodes that the node's sockets reach: the nodes of one socket, or, where a node spans several
sockets, all the nodes of those. Where the machine does not name its sockets, nodes nearer to each other than 20 (the
kernel's ``REMOTE_DISTANCE``, ``linux/topology.h``) form one domain.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from ds_numa.topology import Topology

REMOTE_DISTANCE = 20


class Core(NamedTuple):
    """What is dealt out as one: the CPUs of a physical core that may be used. Sorts by socket, cache and CPU."""

    socket: int  # lowest CPU of its socket; -1 where unknown
    l3: int  # lowest CPU of its last-level cache; -1 where unknown
    cpus: tuple[int, ...]  # ascending
    number: int  # lowest CPU of the physical core, usable or not
    node: int | None  # the first node that lists it
    kind: int  # index of its class (P cores, E cores)


def read_cores(topology: Topology, selected: Iterable[int]) -> list[Core]:
    """The physical cores of these CPUs, by ascending `Core.number`."""
    wanted = set(selected)
    node_of: dict[int, int] = {}
    for node in reversed(topology.nodes):
        node_of.update(dict.fromkeys(node.cpus, node.id))
    socket_of, l3_of = _lowest(topology.sockets), _lowest(topology.l3)
    kind_of = {cpu: kind for kind, group in enumerate(topology.core_classes) for cpu in group}
    all_wanted = len(wanted) == sum(map(len, topology.cores))
    cores = []
    for siblings in topology.cores:
        ordered = tuple(sorted(siblings))
        cpus = ordered if all_wanted else tuple([cpu for cpu in ordered if cpu in wanted])
        if cpus:
            cpu = cpus[0]
            places = (socket_of.get(cpu, -1), l3_of.get(cpu, -1), cpus, ordered[0], node_of.get(cpu))
            cores.append(Core(*places, kind_of.get(cpu, 0)))
    cores.sort(key=attrgetter("number"))
    return cores


def _lowest(groups: Iterable[tuple[int, ...]]) -> dict[int, int]:
    """The lowest CPU of each CPU's group."""
    found: dict[int, int] = {}
    for group in groups:
        if group:
            found.update(dict.fromkeys(group, min(group)))
    return found


class Layout:
    """The cores to deal out, by place.

    Attributes:
        by_node: the cores of each node that has some, by (socket, cache, CPU). Near nodes follow each other, and the
            nodes of a socket domain are together.
        row: all cores, in that order.
        domain: the socket domain of each node with CPUs (usable or not); -1 for cores that no node lists.
    """

    def __init__(self, topology: Topology, cores: Iterable[Core]) -> None:
        self._distances = {node.id: node.distances for node in topology.nodes}
        self._cpus = {node.id: node.cpus for node in topology.nodes}
        self.domain = _domains(topology)
        blocks: dict[int | None, list[Core]] = {}
        for core in cores:
            blocks.setdefault(core.node, []).append(core)
        for block in blocks.values():
            block.sort()
        self.by_node = {node: blocks[node] for node in self._walk(set(blocks))}
        self.row = [core for block in self.by_node.values() for core in block]

    def distance(self, a: int | None, b: int | None) -> int:
        """The kernel's distance between two nodes."""
        if a is None or b is None:
            return 1000  # no node lists these cores: far from everything
        return self._distances.get(a, {}).get(b, 10 if a == b else REMOTE_DISTANCE)

    def knows(self, node: int | None) -> bool:
        """Whether the machine has this node."""
        return node in self._cpus

    def shares_cpus(self, a: int, b: int | None) -> bool:
        """Whether two nodes list the same CPUs, or some (``numa=fake=``)."""
        return b is not None and not set(self._cpus[a]).isdisjoint(self._cpus[b])

    def domain_of(self, node: int) -> int:
        """The socket domain of a node; for one without CPUs, that of the nearest node that has some."""
        if node not in self.domain:
            node = min((other for other in self._cpus if self._cpus[other]), key=lambda n: (self.distance(node, n), n))
        return self.domain[node]

    def home(self, node: int) -> int | None:
        """The node with usable cores that is nearest to this one: itself, else one of its socket domain, else any."""
        if node in self.by_node:
            return node
        cpus = set(self._cpus[node])
        for core in self.row:  # nodes that list the same CPUs (numa=fake=): the first of them has the cores
            if not cpus.isdisjoint(core.cpus):
                return core.node
        mine = self.domain_of(node)
        return min(
            self.by_node,
            key=lambda n: (n is None, self.domain.get(n) != mine, self.distance(node, n), -1 if n is None else n),
        )

    def level(self, a: Core, b: Core) -> int:
        """What lies between two cores: 3 for a socket's edge, 2 for a node's, 1 for a cache's, 0 for nothing."""
        if a.socket != b.socket or self.domain.get(a.node) != self.domain.get(b.node):
            return 3
        return 2 if a.node != b.node else int(a.l3 != b.l3)

    def _walk(self, rest: set[int | None]) -> list[int | None]:
        """The nodes from the lowest on; each is followed by the nearest that is left, those of its domain first."""
        order: list[int | None] = []
        while rest:
            last = order[-1] if order else None
            order.append(
                min(
                    rest,
                    key=lambda node: (
                        node is None,
                        bool(order) and self.domain.get(node) != self.domain.get(last),
                        self.distance(last, node) if order else 0,
                        -1 if node is None else node,
                    ),
                )
            )
            rest = rest - {order[-1]}
        return order


def _domains(topology: Topology) -> dict[int | None, int]:
    """See [Note: socket domain]: connected nodes get the lowest node's id as their domain."""
    nodes = [node for node in topology.nodes if node.cpus]
    domain: dict[int | None, int] = {None: -1} | {node.id: node.id for node in nodes}

    def join(a: int, b: int) -> None:
        old, new = sorted((domain[a], domain[b]), reverse=True)
        if old != new:
            domain.update({node: new for node, its in domain.items() if its == old})

    if topology.sockets:
        socket_of = {cpu: i for i, socket in enumerate(topology.sockets) for cpu in socket}
        first: dict[int, int] = {}  # the first node of each socket
        for node in nodes:
            for socket in {socket_of[cpu] for cpu in node.cpus if cpu in socket_of}:
                join(node.id, first.setdefault(socket, node.id))
        return domain
    for i, a in enumerate(nodes):
        for b in nodes[i + 1 :]:
            near = min(a.distances.get(b.id, REMOTE_DISTANCE), b.distances.get(a.id, REMOTE_DISTANCE))
            if near < REMOTE_DISTANCE or not set(a.cpus).isdisjoint(b.cpus):
                join(a.id, b.id)
    return domain

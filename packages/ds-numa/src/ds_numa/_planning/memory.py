"""Which memory goes with a rank's CPUs.

Every node with memory and no CPUs belongs to the CPU nodes nearest to it: those that firmware names as its initiators,
else those at the least distance. A rank owns the memory of its own nodes and the ordinary memory that belongs to them.
"""

from __future__ import annotations

from typing import Literal

from ds_numa._words import listed
from ds_numa.errors import PlanError
from ds_numa.topology import Node, Topology

MemoryMode = Literal["preferred", "bind", "interleave", "none"]
_MODES: dict[str, MemoryMode] = {
    "preferred": "preferred",
    "bind": "bind",
    "interleave": "interleave",
    "none": "none",
    "prefer": "preferred",  # the older spelling
}


def read_memory_mode(mode: str) -> MemoryMode:
    """The memory mode of this name.

    Raises:
        PlanError: there is none.
    """
    if not isinstance(mode, str) or mode not in _MODES:
        raise PlanError(f"memory = {mode!r} must be one of 'preferred', 'bind', 'interleave', 'none'")
    return _MODES[mode]


class MemoryChooser:
    """Chooses memory for the ranks of one plan, and remembers what a reader should know about it."""

    def __init__(self, topology: Topology, mode: MemoryMode) -> None:
        may = topology.allowed_memory
        self.mode: MemoryMode = mode if topology.numa else "none"
        self._topology = topology
        self._usable = [
            node
            for node in topology.nodes
            if node.memory_bytes != 0 and node.kind != "empty" and (may is None or node.id in may)
        ]
        self._cpu_nodes = [node.id for node in topology.nodes if node.cpus]
        self._owners = {node.id: self._owners_of(node) for node in self._usable if not node.cpus}
        self._used: set[int] = set()
        self._alone: set[int] = set()  # nodes of ranks that have too few nodes to interleave
        self._notes: dict[str, None] = {}  # an ordered set
        self._chosen: dict[tuple[int, ...], tuple[MemoryMode, tuple[int, ...]]] = {}
        unknown = self._of_kind("unknown")
        self._softened = self.mode == "bind" and bool(unknown)
        if self._softened:
            self.mode = "preferred"
            self._note(
                f"memory='bind' would shut out {_describe(unknown)} of unknown kind: "
                "the ranks' nodes are preferred instead"
            )

    def choose(self, nodes: tuple[int, ...]) -> tuple[MemoryMode, tuple[int, ...]]:
        """The memory policy and the memory nodes of a rank whose CPUs are on `nodes`."""
        if nodes not in self._chosen:
            self._chosen[nodes] = self._choose(nodes)
        return self._chosen[nodes]

    def notes(self) -> list[str]:
        """What is out of the ordinary about the choices so far."""
        if self._alone:
            where = listed("node", sorted(self._alone))
            self._note(f"memory='interleave' needs several nodes with memory: ranks on {where} alone keep the default")
        if self.mode != "none":
            if not self._softened:
                self._say_unused(
                    "unknown", "of unknown kind that no rank asks for: it is used when other nodes are full"
                )
            self._say_unused("hbm", "of high-bandwidth memory that is near to no rank and is not used on purpose")
        if self.mode == "bind":
            self._say_unused("cxl", "on a memory expander that memory='bind' shuts out: use memory='preferred'")
        return list(self._notes)

    def _choose(self, nodes: tuple[int, ...]) -> tuple[MemoryMode, tuple[int, ...]]:
        if self.mode == "none" or not nodes:
            return "none", ()
        fast = self._belonging("hbm", nodes)
        if fast:
            self._used.update(fast)
            if self.mode != "preferred":
                self._note(f"high-bandwidth memory is preferred, also with memory={self.mode!r}: a rank may need more")
            return "preferred", tuple(sorted(fast))
        # A node without memory of its own, or whose memory is not allowed, uses the nearest that has some.
        own = sorted({near for node in nodes for near in self._nearest(node)} | self._belonging("ram", nodes))
        if self.mode == "interleave" and len(own) > 1:
            return "interleave", tuple(own)
        if self.mode == "interleave":
            self._alone.update(nodes)
            return "none", ()
        if not own or {node.id for node in self._usable} <= set(own):
            return "none", ()  # there is nothing to choose
        return self.mode, tuple(own)

    def _nearest(self, node_id: int) -> list[int]:
        found = [node.id for node in self._usable if node.cpus]
        reach = min((self._topology.distance(node_id, other) for other in found), default=0)
        return [other for other in found if self._topology.distance(node_id, other) == reach]

    def _belonging(self, kind: str, nodes: tuple[int, ...]) -> set[int]:
        return {node.id for node in self._of_kind(kind) if not self._owners[node.id].isdisjoint(nodes)}

    def _owners_of(self, node: Node) -> set[int]:
        named = set(node.initiators).intersection(self._cpu_nodes)
        if named:
            return named
        reach = min((self._topology.distance(cpu_node, node.id) for cpu_node in self._cpu_nodes), default=0)
        return {cpu_node for cpu_node in self._cpu_nodes if self._topology.distance(cpu_node, node.id) == reach}

    def _of_kind(self, kind: str) -> list[Node]:
        return [node for node in self._usable if node.kind == kind]

    def _say_unused(self, kind: str, what: str) -> None:
        unused = [node for node in self._of_kind(kind) if node.id not in self._used]
        if unused:
            self._note(f"{_describe(unused)} {what}")

    def _note(self, note: str) -> None:
        self._notes[note] = None


def _describe(nodes: list[Node]) -> str:
    """``node 2 (96.0 GiB)`` for each."""
    sizes = ("size unknown" if node.memory_bytes is None else f"{node.memory_bytes / 2**30:.1f} GiB" for node in nodes)
    return ", ".join(f"node {node.id} ({size})" for node, size in zip(nodes, sizes, strict=True))

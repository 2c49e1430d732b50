"""What binding did, as plain data and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ds_numa._ranges import format_ranges
from ds_numa.plan import Binding


@dataclass(frozen=True)
class BindReport:
    """What binding did, as it was read back from the kernel. ``str(report)`` says it in words.

    Attributes:
        local_rank: the rank; None where nothing says it, and nothing was bound.
        cpus: the CPUs that the process may run on now.
        cpus_bound: whether a CPU mask was set.
        memory_bound: whether a memory policy was set.
        refused: what was not granted or could not be done, each with its reason; the rest is in force.
        notes: what else a reader should know.
        binding: what was asked for; None when no plan was possible.
        memory: the memory policy in force now (``preferred``, ``bind``, ``interleave``); None for the default.
        memory_nodes: the nodes of this policy.
    """

    local_rank: int | None
    cpus: tuple[int, ...]
    cpus_bound: bool = False
    memory_bound: bool = False
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    binding: Binding | None = None
    memory: str | None = None
    memory_nodes: tuple[int, ...] = ()

    @property
    def complete(self) -> bool:
        """Nothing was refused."""
        return not self.refused

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json`` can write."""
        data = asdict(self) | {"cpus": format_ranges(self.cpus), "complete": self.complete}
        if self.binding is not None:
            data["binding"] |= {"cpus": format_ranges(self.binding.cpus)}
        return data

    def __str__(self) -> str:
        if self.cpus_bound:
            state = "bound to"
        elif self.memory_bound:
            state = "running on"
        else:
            state = f"{'not bound' if self.refused else 'nothing to bind'}, running on"
        done = [f"{state} CPUs {format_ranges(self.cpus)}"]
        if self.memory is not None:
            done.append(f"memory: {describe_memory(self.memory, self.memory_nodes)}")
        parts = ["; ".join(done)]
        parts += [f"refused: {refusal}" for refusal in self.refused]
        parts += [f"note: {note}" for note in self.notes]
        return f"local rank {'unknown' if self.local_rank is None else self.local_rank}: " + "; ".join(parts)


def describe_memory(mode: str, nodes: tuple[int, ...]) -> str:
    """``preferred node 0``, ``bind nodes 0-1``, ``default``."""
    return "default" if not nodes else f"{mode} node{'s' if len(nodes) > 1 else ''} {format_ranges(nodes)}"

"""`Waits`: which rank waits for which, read from notes in the store; finds ranks that wait in a cycle.

[Note: deadlock] A rank that waits in a round needs every member of it. So if rank 0 needs rank 1, which waits in
another round that needs rank 0, neither can go on: one cycle is a deadlock, whatever else the ranks wait for. The
notes are not one snapshot, so a cycle is read a second time after a pause, and counts if nothing in it has moved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._meeting import Part, Round, spell

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

READS = 40  # that one look may do; as many again confirm a cycle
_LISTED = 256  # more members than these are written down only when the wait gets long
_SHOWN = 8

Picture = dict[int, tuple[str, tuple[int, ...]]]  # rank -> what it waits for, ranks that it waits for


@dataclass(frozen=True)
class Wait:
    """One rank's wait in one round.

    Attributes:
        rank: that waits.
        what: it waits for, for people to read.
        ranks: the members of the round, in their places.
        round: where they meet.
    """

    rank: int
    what: str
    ranks: Sequence[int]
    round: Round

    def missing(self, reads: int) -> list[tuple[int, int]]:
        """Who has not come: a rank, and how many members from it on it stands for."""
        return [(self.ranks[first], last - first + 1) for first, last in self.round.missing(reads)]


class Waits:
    """The notes of all ranks about what they wait for.

    Args:
        store: of the default process group.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank

    def note(self, wait: Wait, *, long: bool = False) -> None:
        """Write down what this rank waits for now. One wait at a time."""
        members = _pack(wait.ranks, long)
        self._store.set(_key(self._rank), json.dumps([wait.round.base, wait.what, len(wait.ranks), members]))

    def clear(self) -> None:
        """This rank waits no longer."""
        self._store.set(_key(self._rank), "")

    def read(self, rank: int) -> Wait | None:
        """What ``rank`` waits for; None where it asks for nothing."""
        text = self._store.compare_set(_key(rank), "", "")  # a read that does not wait for the key
        if not text:
            return None
        base, what, size, members = json.loads(text)
        ranks = range(*members[0]) if members and isinstance(members[0], list) else members
        return Wait(rank, what, ranks, Round(self._store, base, size))

    def look(self, own: Wait) -> tuple[dict[int, Wait | None], Picture, list[Wait]]:
        """Follow who waits for whom, from this rank on.

        Returns:
            What the ranks on the way wait for; that as a picture; and the waits of a cycle, empty if there is none.
        """
        seen: dict[int, Wait | None] = {own.rank: own}
        picture: Picture = {}
        reads = READS

        def follow(path: list[Wait]) -> list[Wait]:
            nonlocal reads
            wait = path[-1]
            if not wait.ranks or reads <= 0:
                return []
            limit = min(4, reads)
            reads -= min(limit, wait.round.buckets)
            missing = wait.missing(limit)
            picture[wait.rank] = wait.what, tuple(rank for rank, _ in missing)
            for rank in [rank for rank, count in missing if count == 1]:
                before = next((place for place, other in enumerate(path) if other.rank == rank), None)
                if before is not None:
                    return path[before:]
                if rank not in seen and reads > 0:
                    reads -= 1
                    found = seen[rank] = self.read(rank)
                    cycle = follow([*path, found]) if found is not None else []
                    if cycle:
                        return cycle
            return []

        return seen, picture, follow([own])

    def stands(self, cycle: Sequence[Wait]) -> bool:
        """Whether each rank of the cycle waits as before for the next one."""
        for wait, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            now = wait if wait.rank == self._rank else self.read(wait.rank)
            if now is None or now.round.base != wait.round.base:
                return False
            if not wait.round.is_missing(list(wait.ranks).index(following.rank)):
                return False
        return True


def describe(picture: Picture, seen: dict[int, Wait | None]) -> str:
    """Lines that say who waits for whom.

    Args:
        picture: rank -> what it waits for, ranks that it waits for.
        seen: what was read about other ranks; None where one asks for nothing.
    """
    lines = [f"  rank {rank} waits for {what}: {shown(others)} missing" for rank, (what, others) in picture.items()]
    idle = sorted(rank for rank, wait in seen.items() if wait is None)
    if idle:
        lines.append(f"  {shown(idle)}: asking for no group now")
    return "\n".join(lines)


def shown(ranks: Sequence[int]) -> str:
    """Spell ranks, the first few of them."""
    if len(ranks) <= _SHOWN:
        return spell(ranks)
    return f"{spell(ranks[:_SHOWN])} and {len(ranks) - _SHOWN} more"


def spell_missing(ranks: Sequence[int], parts: Sequence[Part]) -> str:
    """Spell members that did not come; of a part that was not read to the end, its first rank and its size."""
    exact = [ranks[first] for first, last in parts if first == last]
    rough = [
        f"some of the {last - first + 1} members from rank {ranks[first]} on" for first, last in parts if first < last
    ]
    return ", ".join([*([spell(exact)] if exact else []), *rough])


def _key(rank: int) -> str:
    return f"ds-groups/waits/{rank}"


def _pack(ranks: Sequence[int], long: bool) -> list[int] | list[list[int]]:
    """Ranks as they are, or as the arguments of one range; nothing where that takes long to write."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    stepped = range(ranks[0], ranks[0] + step * len(ranks), step) if step else range(0)
    if isinstance(ranks, range) or tuple(stepped) == tuple(ranks):
        return [[stepped.start, stepped.stop, stepped.step]]
    return list(ranks) if long or len(ranks) <= _LISTED else []

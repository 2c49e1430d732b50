"""Who hangs where, from what every rank says it is doing. Pure: no communication, no clock.

[Note: stuck] A group is stuck at the lowest sequence number in flight on any of its ranks: later operations wait for
that one. Of its ranks, those are *behind* whose last operation has a lower number. A rank may be behind because
it waits in another group; the one that waits nowhere is the reason. In flight means issued and not known to be over; a
rank that issues without waiting may have several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ds_logging._comms.bandwidth import convert_size
from ds_logging._comms.operation import Operation
from ds_logging._comms.table import format_ranks
from ds_logging._hang.states import RankState

MAX_FINDINGS = 25
_RUNS = 8  # of ranks that a sentence names
_PAIRED = {"send": "recv", "recv": "send"}
_PARTIAL = ("batch_isend_irecv", "send_object_list", "recv_object_list")  # not every rank of the group takes part
_UNEVEN = ("all_to_all", "gather", "scatter", "barrier", "coalesced")  # ranks may pass in different numbers of bytes

FindingKind = Literal[
    "no_answer", "error", "deadlock", "kind_mismatch", "shape_mismatch", "behind", "unmatched_p2p", "waiting", "network"
]
_ORDER: tuple[FindingKind, ...] = FindingKind.__args__  # type: ignore[attr-defined]


class GroupKey(NamedTuple):
    """A process group by its name and global ranks."""

    name: str
    ranks: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what is wrong.
        ranks: that are the reason, as far as this finding says.
        waiting: ranks that wait because of it.
        group: name of the process group; "" where it is no matter of one.
        sequence: number of the operation in the group, where there is one.
        text: one sentence.
    """

    kind: FindingKind
    ranks: tuple[int, ...]
    waiting: tuple[int, ...]
    group: str
    sequence: int | None
    text: str


def explain_states(states: Mapping[int, RankState | None]) -> str:
    """Return what is wrong in words, the likeliest reason first; a state is ``None`` where a rank did not answer."""
    findings = find_reasons(states)
    answered = sum(state is not None for state in states.values())
    lines = [f"{answered} of {len(states)} ranks answer."]
    lines += [f"- {finding.text}" for finding in findings[:MAX_FINDINGS]]
    if len(findings) > MAX_FINDINGS:
        lines.append(f"- ... and {len(findings) - MAX_FINDINGS} more")
    if not findings:
        lines.append("- No rank waits in an operation that was recorded.")
    return "\n".join(lines)


def find_reasons(states: Mapping[int, RankState | None]) -> list[Finding]:
    """Return what is wrong, the likeliest reason first."""
    survey = _Survey(states)
    findings = [*survey.collectives(), *survey.point_to_point()]  # they find who waits, which the others need
    findings += [*survey.behind(), *survey.deadlocks(), *survey.silent_ranks()]

    def importance(finding: Finding) -> tuple[int, bool]:
        return _ORDER.index(finding.kind), survey.waiting.issuperset(finding.ranks)

    return sorted(findings, key=importance)


class _Survey:
    def __init__(self, states: Mapping[int, RankState | None]) -> None:
        self.states = {rank: state for rank, state in states.items() if state is not None and state.error is None}
        self.errors = {rank: state.error for rank, state in states.items() if state is not None and state.error}
        self.silent = sorted(rank for rank, state in states.items() if state is None)
        self.late: list[tuple[Operation, tuple[int, ...], tuple[int, ...]]] = []  # in what, who, who waits
        self.waiting: set[int] = set()  # ranks that wait for another one
        self.waits: dict[int, list[tuple[Operation, tuple[int, ...]]]] = {}  # rank: where, and for whom
        self.waits_for_silent: dict[int, list[tuple[int, Operation]]] = {}  # silent rank: who waits, and where

    def collectives(self) -> Iterator[Finding]:
        groups: dict[GroupKey, dict[int, list[Operation]]] = {}
        collectives = [
            (rank, op) for rank, state in self.states.items() for op in state.operations if op.kind not in _PAIRED
        ]
        known = {op.group: op.ranks for _, op in collectives if op.ranks is not None}
        for rank, op in collectives:
            key = GroupKey(op.group, op.ranks or known.get(op.group))
            groups.setdefault(key, {}).setdefault(rank, []).append(op)
        for group, operations in groups.items():
            yield from self._stuck(group, operations)

    def _stuck(self, group: GroupKey, operations: Mapping[int, list[Operation]]) -> Iterator[Finding]:
        members = group.ranks if group.ranks is not None else tuple(sorted(operations))
        unnumbered: dict[str, dict[int, Operation]] = {}
        for rank, ops in operations.items():
            for op in ops:
                if op.completed or (op.sequence is not None and op.kind not in _PARTIAL):
                    continue
                if op.kind in _PARTIAL:
                    text = f"Rank {rank} is in {self._describe(op, rank)}; for whom it waits was not recorded."
                    yield Finding("waiting", (), (rank,), group.name, op.sequence, text)
                else:
                    unnumbered.setdefault(op.kind, {})[rank] = op
        for entered in unnumbered.values():
            yield from self._compare(group, members, None, entered, came=set(entered))
        numbered: dict[int, dict[int, Operation]] = {}
        for rank, ops in operations.items():
            for op in ops:
                if op.sequence is not None and op.kind not in _PARTIAL:
                    numbered.setdefault(op.sequence, {})[rank] = op
        in_flight = [number for number, by_rank in numbered.items() if any(not op.completed for op in by_rank.values())]
        if in_flight:
            first = min(in_flight)
            came = {rank for number, by_rank in numbered.items() if number >= first for rank in by_rank}
            yield from self._compare(group, members, first, numbered[first], came)

    def _compare(
        self,
        group: GroupKey,
        members: tuple[int, ...],
        sequence: int | None,
        entered: Mapping[int, Operation],
        came: set[int],
    ) -> Iterator[Finding]:
        """Compare the ranks of a group in one operation: those that ``came`` to it, of which ``entered`` has it."""
        waiting = tuple(sorted(rank for rank, op in entered.items() if not op.completed))
        behind = tuple(rank for rank in members if rank in self.states and rank not in came)
        silent = tuple(rank for rank in members if rank in self.silent or rank in self.errors)
        example = entered[waiting[0]]
        for rank in waiting:
            if behind or silent:
                self.waiting.add(rank)
            if behind:
                self.waits.setdefault(rank, []).append((entered[rank], behind))
            for other in silent:
                self.waits_for_silent.setdefault(other, []).append((rank, entered[rank]))
        mismatch = None if sequence is None else self._mismatch(group, sequence, entered, waiting)
        if mismatch is not None:
            yield mismatch
        if behind:
            self.late.append((example, behind, waiting))
        elif not silent and mismatch is None:
            done = tuple(sorted(rank for rank, op in entered.items() if op.completed))
            passed = f", {_ranks(done, capital=False)} completed it" if done else ""
            longest = max(waiting, key=lambda rank: self._waited(entered[rank], rank))
            text = (
                f"Every rank of group {group.name} entered {_name(example)} ({_size(example)}){passed}, and "
                f"{_wait(waiting)} for the network or the device "
                f"(rank {longest} for {self._waited(entered[longest], longest):.0f} s)."
            )
            yield Finding("network", (), waiting, group.name, sequence, text)

    def behind(self) -> Iterator[Finding]:
        for op, behind, waiting in self.late:
            reasons = tuple(rank for rank in behind if rank not in self.waiting) or behind
            # Without a number nobody knows whether the rank was in it before and has left it.
            verb = "never entered" if op.sequence is not None else "is not in" if len(reasons) == 1 else "are not in"
            text = f"{_ranks(reasons)} {verb} {_name(op)}, in which {_wait(waiting)}; {self._places(reasons)}."
            held_up = set(behind) - set(reasons)
            if held_up:
                text += f" {_ranks(held_up)} did not either, and {_wait(held_up, name=False)} elsewhere."
            yield Finding("behind", reasons, waiting, op.group, op.sequence, text)

    def _mismatch(
        self, group: GroupKey, sequence: int, entered: Mapping[int, Operation], waiting: tuple[int, ...]
    ) -> Finding | None:
        def parts_by(label: Mapping[int, str]) -> tuple[tuple[int, ...], str]:
            sets: dict[str, list[int]] = {}
            for rank, what in label.items():
                sets.setdefault(what, []).append(rank)
            ordered = sorted(sets.items(), key=lambda item: (-len(item[1]), item[1]))
            fewer = tuple(sorted(rank for _, ranks in ordered[1:] for rank in ranks))
            ordered.sort(key=lambda item: item[1])
            return fewer, ", ".join(f"{_ranks(ranks, capital=False)} in {what}" for what, ranks in ordered)

        kinds = {rank: op.kind for rank, op in entered.items()}
        if len(set(kinds.values())) > 1:
            fewer, parts = parts_by(kinds)
            text = f"Operation {sequence} of group {group.name} is not the same on all ranks: {parts}."
            return Finding("kind_mismatch", fewer, waiting, group.name, sequence, text)
        kind = next(iter(kinds.values()))
        uneven = kind in _UNEVEN
        sizes = {rank: op.dtype if uneven else _size(op) for rank, op in entered.items()}
        if kind == "barrier" or len(set(sizes.values())) < 2:
            return None
        fewer, parts = parts_by({rank: f"{kind} of {size}" for rank, size in sizes.items()})
        what = "dtype" if len({op.nbytes for op in entered.values()}) == 1 or uneven else "size"
        text = f"Operation {sequence} of group {group.name} has not the same {what} on all ranks: {parts}."
        return Finding("shape_mismatch", fewer, waiting, group.name, sequence, text)

    def point_to_point(self) -> Iterator[Finding]:
        for rank, state in self.states.items():
            for op in state.in_flight():
                if op.kind in _PAIRED:
                    yield from self._pair(rank, op)

    def _pair(self, rank: int, op: Operation) -> Iterator[Finding]:
        peer = op.peer
        place = self._describe(op, rank)
        if peer is None:
            text = f"Rank {rank} is in {place}, from any rank."
            yield Finding("waiting", (), (rank,), op.group, op.sequence, text)
            return
        if peer not in self.states:
            self.waiting.add(rank)
            self.waits_for_silent.setdefault(peer, []).append((rank, op))
            return
        partner = next((other for other in self.states[peer].operations if _belongs(rank, op, other)), None)
        if partner is None:
            self.waiting.add(rank)
            self.waits.setdefault(rank, []).append((op, (peer,)))
            missing = "has not sent it" if op.kind == "recv" else "does not receive it"
            text = f"Rank {rank} is in {place}; rank {peer} {missing}; {self._places((peer,))}."
            yield Finding("unmatched_p2p", (peer,), (rank,), op.group, op.sequence, text)
        elif partner.sequence == op.sequence and _size(partner) != _size(op) and (rank < peer or partner.completed):
            text = (
                f"Rank {rank} is in {place} of {_size(op)}, and rank {peer} in {_name(partner)} of {_size(partner)}: "
                "sizes or dtypes differ."
            )
            yield Finding("shape_mismatch", (rank, peer), (rank,), op.group, op.sequence, text)
        elif _size(partner) == _size(op) and (op.kind == "recv" or partner.completed):
            text = f"Rank {rank} is in {place}, and rank {peer} entered its side of it: they wait for the network."
            yield Finding("network", (), (rank,), op.group, op.sequence, text)

    def deadlocks(self) -> Iterator[Finding]:
        cyclic: set[int] = set()
        done: set[int] = set()
        for start in self.waits:
            cycle = None if start in done else self._cycle(start, done)
            if cycle is None or cyclic & {rank for rank, _ in cycle}:
                continue
            cyclic |= {rank for rank, _ in cycle}
            steps = [f"rank {rank} in {_name(op)}" for rank, op in cycle]
            text = f"Deadlock: {', which waits for '.join(steps)}, which waits for rank {cycle[0][0]}."
            if len({op.group for _, op in cycle}) > 1:
                text += " The ranks use these groups in different orders."
            ranks = tuple(rank for rank, _ in cycle)
            yield Finding("deadlock", ranks, ranks, cycle[0][1].group, cycle[0][1].sequence, text)

    def _cycle(self, start: int, done: set[int]) -> list[tuple[int, Operation]] | None:
        """Follow who waits for whom, depth first; return the ranks of a cycle and where each waits."""
        path: list[tuple[int, Operation]] = []
        place: dict[int, int] = {}
        stack: list[tuple[int, Iterator[tuple[Operation, int]]]] = []

        def enter(rank: int) -> None:
            place[rank] = len(stack)
            done.add(rank)
            edges = ((op, other) for op, others in self.waits.get(rank, ()) for other in others)
            stack.append((rank, edges))

        enter(start)
        while stack:
            rank, edges = stack[-1]
            del path[len(stack) - 1 :]
            for op, other in edges:
                path.append((rank, op))
                if other in place:
                    return path[place[other] :]
                if other not in done:
                    enter(other)
                    break
                path.pop()
            else:
                stack.pop()
                del place[rank]
        return None

    def silent_ranks(self) -> Iterator[Finding]:
        for rank, error in self.errors.items():
            text = f"Rank {rank} answers, but cannot say what it does: {error}."
            yield Finding("error", (rank,), self._waiting_for(rank), "", None, text + self._held_up(rank))
        alike: dict[str, list[int]] = {}
        for rank in self.silent:
            alike.setdefault(self._held_up(rank), []).append(rank)
        for held_up, ranks in alike.items():
            verb, their = ("does", "its process") if len(ranks) == 1 else ("do", "their processes")
            why = f"{their} ended, no log records there, or something holds the GIL"
            text = f"{_ranks(ranks)} {verb} not answer: {why}.{held_up}"
            yield Finding("no_answer", tuple(ranks), self._waiting_for(ranks[0]), "", None, text)

    def _waiting_for(self, rank: int) -> tuple[int, ...]:
        return tuple(sorted({waiting for waiting, _ in self.waits_for_silent.get(rank, ())}))

    def _held_up(self, rank: int) -> str:
        places: dict[str, list[int]] = {}
        for waiting, op in self.waits_for_silent.get(rank, ()):
            places.setdefault(_name(op), []).append(waiting)
        return "".join(f" {_ranks(ranks)} may wait for it in {name}." for name, ranks in list(places.items())[:3])

    def _places(self, ranks: Iterable[int]) -> str:
        """Say where ranks are: "it is in broadcast 811 of group tp for 12 s"."""
        alike: dict[str, list[int]] = {}
        for rank in ranks:
            alike.setdefault(self._place(rank), []).append(rank)
        whose = list(alike.items())
        if len(whose) == 1:
            text, these = whose[0]
            return f"it {text}" if len(these) == 1 else f"each of them {text}"
        parts = [f"{_ranks(these, capital=False)}: {text}" for text, these in whose[:4]]
        return "; ".join(parts) + (f"; and {len(whose) - 4} others" if len(whose) > 4 else "")

    def _place(self, rank: int) -> str:
        state = self.states[rank]
        in_flight = state.in_flight()
        if in_flight:
            more = f" and in {len(in_flight) - 1} more" if len(in_flight) > 1 else ""
            return f"is in {self._describe(in_flight[0], rank)}{more}"
        if not state.operations:
            return "has entered no operation"
        return f"is in no operation, and its last was {_name(max(state.operations, key=lambda op: op.started_ns))}"

    def _waited(self, op: Operation, rank: int) -> float:
        return max(0, self.states[rank].now_ns - op.started_ns) / 1e9

    def _describe(self, op: Operation, rank: int) -> str:
        return f"{_name(op)} for {self._waited(op, rank):.0f} s"


def _belongs(rank: int, op: Operation, other: Operation) -> bool:
    """Say whether ``other``, of the peer, is the other side of ``op``, or a later one, which comes after it."""
    if other.kind != _PAIRED[op.kind] or other.group != op.group or other.peer not in (rank, None):
        return False
    if op.sequence is None or other.sequence is None:
        return not other.completed
    return other.sequence >= op.sequence


def _name(op: Operation) -> str:
    number = "" if op.sequence is None else f" {op.sequence}"
    side = {"send": " to rank ", "recv": " from rank "}.get(op.kind, "")
    return f"{op.kind}{number}{f'{side}{op.peer}' if side and op.peer is not None else ''} of group {op.group}"


def _size(op: Operation) -> str:
    return f"{op.nbytes} bytes{f' {op.dtype}' if op.dtype else ''}" if op.nbytes < 1024 else (
        f"{convert_size(op.nbytes)} ({op.nbytes} bytes){f' {op.dtype}' if op.dtype else ''}"
    )  # fmt: skip


def _ranks(ranks: Iterable[int], *, capital: bool = True) -> str:
    several = sorted(set(ranks))
    word = "rank" if len(several) == 1 else "ranks"
    runs = format_ranks(several).split(", ")
    if len(runs) > _RUNS:
        runs[_RUNS - 2 : -1] = ["..."]
        runs[-1] += f" ({len(several)} ranks)"
    return f"{word.capitalize() if capital else word} {', '.join(runs)}"


def _wait(ranks: Iterable[int], *, name: bool = True) -> str:
    several = set(ranks)
    verb = "waits" if len(several) == 1 else "wait"
    return f"{_ranks(several, capital=False)} {verb}" if name else verb

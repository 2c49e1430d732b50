"""Find where ranks that stopped have parted, and the leaf that would have helped. Pure: no communication.

[Note: counted events] Ranks may call modules in different order inside a leaf or an FSDP2 unit: the engine gathers
nothing there. So ranks are compared by the events of those modules that the engine gathers for, and by the number that
each such event has since `watch` was entered. Only where these are equal, and as many on every rank, the other events
since the last of them are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds_z3leaf._rehearse.calls import Parting, choose_leaf
from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._watch.history import Report

_LISTED = 32  # ranks in a message


@dataclass(frozen=True)
class Verdict:
    """What the ranks' reports say.

    Attributes:
        parted: whether ranks called modules in different order.
        text: a paragraph, then a line a rank.
    """

    parted: bool
    text: str


@dataclass(frozen=True)
class _Split:
    """Where reports part.

    Attributes:
        places: by rank, the place in its events where it goes its own way; of the ranks that have come so far.
        early: it is the first event that is kept, so that they may have parted before.
        inside: they part inside a leaf, where the engine gathers nothing.
    """

    places: Mapping[int, int]
    early: bool = False
    inside: bool = False


def diagnose(
    reports: Mapping[int, Report],
    ranks: Sequence[int],
    index: ModuleIndex,
    counted: Sequence[bool],
    leaves: Iterable[int],
) -> Verdict:
    """Compare the reports.

    Args:
        reports: by global rank; of those ranks that answered.
        ranks: all global ranks.
        index: the model's modules.
        counted: by number, whether the engine gathers for that module.
        leaves: the numbers of the modules that are leaves already.
    """
    reports = {rank: reports[rank] for rank in sorted(reports)}
    lines = [_line(rank, reports.get(rank), index) for rank in ranks[:_LISTED]]
    if len(ranks) > _LISTED:
        lines.append(f"  and {len(ranks) - _LISTED} ranks more")
    if len({report.index for report in reports.values()}) > 1:
        cause, parted = "The ranks' models have different modules, so that their calls cannot be compared.", False
    else:
        split = _find(reports, counted) or _find_inside(reports, counted)
        parted = split is not None
        cause = _explain(split, reports, index, leaves) if split else _no_cause(reports, ranks)
    return Verdict(parted, "\n".join([cause, *lines]))


def _find(reports: Mapping[int, Report], counted: Sequence[bool]) -> _Split | None:
    """The first counted event that is not the same on all ranks that have reached it."""
    places = {
        rank: [place for place, event in enumerate(report.events) if counted[event if event >= 0 else ~event]]
        for rank, report in reports.items()
    }
    first = {rank: report.counted - len(places[rank]) for rank, report in reports.items()}
    longest = max(reports, key=lambda rank: reports[rank].counted)
    found: int | None = None
    early = False
    for rank, report in reports.items():
        start = max(first[rank], first[longest])
        end = report.counted if found is None else min(report.counted, found)
        for number in range(start, end):
            ours = report.events[places[rank][number - first[rank]]]
            theirs = reports[longest].events[places[longest][number - first[longest]]]
            if ours != theirs:
                found, early = number, number == start > 0
                break
    if found is None:
        return None
    reached = {rank: found - first[rank] for rank in reports if first[rank] <= found < reports[rank].counted}
    return _Split({rank: places[rank][place] for rank, place in reached.items()}, early=early)


def _find_inside(reports: Mapping[int, Report], counted: Sequence[bool]) -> _Split | None:
    """The same inside the leaf that all ranks are in."""
    if len({report.counted for report in reports.values()}) > 1:
        return None
    starts = {}
    for rank, report in reports.items():
        place = len(report.events)
        while place and not counted[_module(report.events[place - 1])]:
            place -= 1
        starts[rank] = place
    longest = max(len(report.events) - starts[rank] for rank, report in reports.items())
    for step in range(longest):
        reached = {
            rank: starts[rank] + step for rank, report in reports.items() if starts[rank] + step < len(report.events)
        }
        if len({reports[rank].events[place] for rank, place in reached.items()}) > 1:
            return _Split(reached, inside=True)
    return None


def _explain(split: _Split, reports: Mapping[int, Report], index: ModuleIndex, leaves: Iterable[int]) -> str:
    if split.early:
        return (
            "Ranks called different modules and wait for each other. They parted before the calls that are kept: "
            "enter watch() later, or look with a rehearsal."
        )
    by_event: dict[int, list[int]] = {}
    for rank, place in split.places.items():
        by_event.setdefault(reports[rank].events[place], []).append(rank)
    stacks = [_stack_at(reports[rank], place) for rank, place in split.places.items()]
    stack = _common(stacks)
    needed = {number for rank, place in split.places.items() for number in _entered(reports[rank], place, len(stack))}
    where = f"in {index.describe(stack[-1])}, " if stack else ""
    does = [f"{_ranks(ranks)} {_does(event, index, len(ranks) > 1)}" for event, ranks in list(by_event.items())[:3]]
    said = f"Ranks called different modules and wait for each other: {where}{' where '.join(does)}. "
    if split.inside:
        leaf = next((number for number in reversed(stack) if number in set(leaves)), None)
        around = (
            f"{index.describe(leaf)} is a leaf already, in which no engine gathers"
            if leaf is not None
            else "No engine gathers there"
        )
        return f"{said}{around}: a collective of the model's own waits."
    leaf = choose_leaf(Parting(stack, None, None, None, frozenset(needed)), leaves, index)
    if leaf is None:
        return said + "No module that all of them are in holds what they call differently, so that no leaf can help."
    return said + (
        f"Make {index.describe(leaf)} a leaf before the engine is built: "
        f"mark_leaves(model, names={index.names[leaf]!r}) for ZeRO-3, fully_shard_leaves() for FSDP2."
    )


def _no_cause(reports: Mapping[int, Report], ranks: Sequence[int]) -> str:
    silent = [rank for rank in ranks if rank not in reports]
    if silent:
        return (
            f"No call of a module for a while, and {_ranks(silent)} gave no answer; the others called the same modules."
        )
    return "No call of a module for a while, but all ranks called the same modules: no leaf is missing."


def _module(event: int) -> int:
    return event if event >= 0 else ~event


def _stack_at(report: Report, place: int) -> tuple[int, ...]:
    """The modules that the rank was in before an event: what it did since, undone."""
    stack = list(report.stack)
    for event in reversed(report.events[place:]):
        if event < 0:
            stack.append(~event)
        elif stack:
            stack.pop()
    return tuple(stack)


def _entered(report: Report, place: int, depth: int) -> set[int]:
    """What the rank entered from an event on, until it left the module that is `depth` deep."""
    here = len(_stack_at(report, place))
    found = set()
    for event in report.events[place:]:
        here += 1 if event >= 0 else -1
        if here < depth:
            break
        if event >= 0:
            found.add(event)
    return found


def _common(stacks: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    same = []
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        same.append(level[0])
    return tuple(same)


def _does(event: int, index: ModuleIndex, several: bool) -> str:
    verb = ("call" if event >= 0 else "end") + ("" if several else "s")
    return f"{verb} {index.describe(_module(event))}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _line(rank: int, report: Report | None, index: ModuleIndex) -> str:
    if report is None:
        return f"  rank {rank}: no answer; its process is gone, or it is in no watch()"
    module = f" of {index.describe(report.stack[-1])}" if report.stack and report.stack[-1] < len(index.names) else ""
    place = report.place.replace("in the forward", f"in the forward{module}", 1)
    if module and place == report.place:
        place = f"{place}, {module[4:]}"
    left = f"; it {report.left}" if report.left else ""
    return f"  rank {rank}: {place}; {report.total} events, the last {report.idle:.1f} s ago{left}"

"""The recent past of one or more ranks as a file that ui.perfetto.dev and chrome://tracing open.

[Note: trace] A rank is a process of the trace, a process group a track in it, and so is a thread with ranges or log
records. Operations of a group that overlap in time stand on further tracks, since slices of one track must not. An
arrow (a *flow*) joins the same operation on all ranks. Times are the ranks' own clocks: between hosts they are as exact
as these agree.
Source: the Trace Event Format of Chrome, events "X", "i", "M", "s", "t" and "f".
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_logging._comms.bandwidth import bandwidth, rule_of
from ds_logging._comms.operation import Operation
from ds_logging._comms.operations_json import read_operations, write_operations
from ds_logging._files import write_atomically
from ds_logging._step import Step
from ds_logging._timeline import LogRecord, Range

Event = dict[str, Any]


@dataclass(slots=True)
class Timeline:
    """What one rank did lately."""

    rank: int
    operations: Sequence[Operation] = ()
    ranges: Sequence[Range] = ()
    records: Sequence[LogRecord] = ()
    steps: Sequence[Step] = ()
    host: str = field(default_factory=socket.gethostname)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, of JSON's types only."""
        events = {"ranges": [*self.ranges], "records": [*self.records], "steps": [*self.steps]}
        return {**write_operations(self.operations), **events, "rank": self.rank, "host": self.host}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timeline:
        """Return the timeline that `to_json` wrote, on this rank or another one."""
        return cls(
            data["rank"],
            read_operations(data),
            [Range(*one) for one in data["ranges"]],
            [LogRecord(*one) for one in data["records"]],
            [Step(*one) for one in data["steps"]],
            data["host"],
        )


def to_perfetto(path: str | os.PathLike[str], timelines: Iterable[Timeline]) -> None:
    """Write the timelines of some ranks as one trace. No communication; the file appears whole or not at all."""
    events, start_ns = trace_events(timelines)
    head = json.dumps({"displayTimeUnit": "ms", "otherData": {"start_time_ns": start_ns}})[:-1]
    lines = (f"{',' if number else ''}\n{json.dumps(event)}" for number, event in enumerate(events))
    write_atomically(path, [head, ', "traceEvents": [', *lines, "\n]}\n"])


def trace_events(timelines: Iterable[Timeline]) -> tuple[list[Event], int]:
    """Return the events, metadata first and then by time, and the ``time.time_ns()`` of the trace's time 0."""
    ranks = sorted(timelines, key=lambda timeline: timeline.rank)
    start_ns = min((moment for timeline in ranks for moment in _moments(timeline)), default=0)
    metadata: list[Event] = []
    events: list[Event] = []
    slices: dict[tuple[object, ...], list[tuple[Operation, Event]]] = {}
    for timeline in ranks:
        tracks = _Tracks(timeline)
        for op, event in _operations(timeline, start_ns, tracks):
            events.append(event)
            slices.setdefault(_identity(timeline.rank, op), []).append((op, event))
        events += _ranges(timeline, start_ns, tracks)
        events += _instants(timeline, start_ns, tracks)
        metadata += tracks.metadata
    events += _flows(slices)
    # At one time the longer slice first, since it holds the others; a flow after the slice that it binds to.
    events.sort(key=lambda event: (event["ts"], event["ph"] in "stf", -event.get("dur", 0.0)))
    return metadata + events, start_ns


def _moments(timeline: Timeline) -> Iterator[int]:
    yield from (op.started_ns for op in timeline.operations)
    yield from (moment for one in timeline.ranges for moment in (one.start_ns, one.end_ns))
    yield from (record.time_ns for record in timeline.records)
    yield from (step.time_ns for step in timeline.steps)


def _end_ns(op: Operation, now_ns: int) -> int:
    if op.latency_ms is not None:
        return op.started_ns + round(op.latency_ms * 1e6)
    return op.started_ns if op.completed else max(now_ns, op.started_ns)


def _micros(duration_ns: int) -> float:
    return duration_ns / 1e3


class _Tracks:
    """Numbers the tracks of one rank, and names them."""

    def __init__(self, timeline: Timeline) -> None:
        self._rank = timeline.rank
        self._numbers: dict[tuple[str, object, int], int] = {}
        self.metadata: list[Event] = []
        self._describe("process_name", 0, name=f"rank {timeline.rank} {timeline.host}")
        self._describe("process_sort_index", 0, sort_index=timeline.rank)

    def number(self, kind: str, what: object, name: str, lane: int = 0) -> int:
        key = (kind, what, lane)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers) + 1
            self._describe("thread_name", self._numbers[key], name=f"{name} ({lane + 1})" if lane else name)
            self._describe("thread_sort_index", self._numbers[key], sort_index=self._numbers[key])
        return self._numbers[key]

    def _describe(self, what: str, track: int, **args: object) -> None:
        self.metadata.append({"ph": "M", "name": what, "pid": self._rank, "tid": track, "args": args})


def _operations(timeline: Timeline, start_ns: int, tracks: _Tracks) -> Iterator[tuple[Operation, Event]]:
    now_ns = max((max(_moments(timeline), default=0), *(_end_ns(op, 0) for op in timeline.operations)), default=0)
    by_group: dict[str, list[Operation]] = {}
    for op in sorted(timeline.operations, key=lambda op: op.started_ns):
        by_group.setdefault(op.group, []).append(op)
    for group, operations in by_group.items():
        lanes = _lanes(operations, lambda op: (op.started_ns, _end_ns(op, now_ns)), nest=False)
        for op, lane in zip(operations, lanes, strict=True):
            end_ns = _end_ns(op, now_ns)
            yield (
                op,
                {
                    "ph": "X",
                    "cat": "communication",
                    "name": op.name if op.completed else f"{op.name} (unfinished)",
                    "pid": timeline.rank,
                    "tid": tracks.number("group", group, f"group {group}", lane),
                    "ts": _micros(op.started_ns - start_ns),
                    "dur": _micros(end_ns - op.started_ns),
                    "args": _arguments(op),
                },
            )


def _arguments(op: Operation) -> dict[str, Any]:
    args: dict[str, Any] = {"kind": op.kind, "sequence": op.sequence, "bytes": op.nbytes, "dtype": op.dtype}
    args |= {"step": op.step, "peer": op.peer, "ranks": None if op.ranks is None else list(op.ranks)}
    if op.latency_ms is not None and op.ranks is not None:
        bus = bandwidth(rule_of(op.kind), op.nbytes, op.latency_ms, len(op.ranks))[1]
        args["busbw_gbps"] = bus if bus == bus else None  # NaN: no formula
    if not op.completed:
        args["state"] = "unfinished: it was in flight when the trace was written"
    elif op.latency_ms is None:
        args["state"] = "completed: its end was not observed"
    return {name: value for name, value in args.items() if value is not None}


def _ranges(timeline: Timeline, start_ns: int, tracks: _Tracks) -> Iterator[Event]:
    by_thread: dict[int, list[Range]] = {}
    for one in sorted(timeline.ranges, key=lambda one: (one.start_ns, -one.end_ns)):
        by_thread.setdefault(one.thread, []).append(one)
    for thread, ranges in by_thread.items():
        lanes = _lanes(ranges, lambda one: (one.start_ns, one.end_ns), nest=True)
        for one, lane in zip(ranges, lanes, strict=True):
            yield {
                "ph": "X",
                "cat": "range",
                "name": one.name,
                "pid": timeline.rank,
                "tid": tracks.number("thread", thread, f"thread {thread}", lane),
                "ts": _micros(one.start_ns - start_ns),
                "dur": _micros(max(0, one.end_ns - one.start_ns)),
                "args": {},
            }


def _instants(timeline: Timeline, start_ns: int, tracks: _Tracks) -> Iterator[Event]:
    for record in timeline.records:
        args: dict[str, Any] = {"level": record.level, "message": record.message}
        yield {
            "ph": "i",
            "s": "t",
            "cat": "log",
            "name": f"{record.level} {record.message[:80]}",
            "pid": timeline.rank,
            "tid": tracks.number("thread", record.thread, f"thread {record.thread}"),
            "ts": _micros(record.time_ns - start_ns),
            "args": args if record.step is None else {**args, "step": record.step},
        }
    for step in timeline.steps:
        yield {
            "ph": "i",
            "s": "p",
            "cat": "step",
            "name": f"step {step.number}",
            "pid": timeline.rank,
            "tid": tracks.number("steps", 0, "steps"),
            "ts": _micros(step.time_ns - start_ns),
            "args": {"step": step.number},
        }


def _lanes(items: Sequence[Any], span: Callable[[Any], tuple[int, int]], *, nest: bool) -> list[int]:
    """Return the lowest track for each item, in order of start, where it overlaps no other (or is inside of it)."""
    open_ends: list[list[int]] = []  # by track: the ends of what is open, the innermost last
    chosen = []
    for item in items:
        start, end = span(item)
        for lane in range(len(open_ends) + 1):
            if lane == len(open_ends):
                open_ends.append([])
            ends = open_ends[lane]
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or (nest and end <= ends[-1]):
                ends.append(end)
                chosen.append(lane)
                break
    return chosen


def _identity(rank: int, op: Operation) -> tuple[object, ...]:
    """Return what an operation has in common with itself on other ranks."""
    if op.kind not in ("send", "recv"):
        return (op.group, op.ranks, op.sequence)
    sender, receiver = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return (op.group, sender, receiver, op.sequence)


def _flows(slices: Mapping[tuple[object, ...], list[tuple[Operation, Event]]]) -> Iterator[Event]:
    number = 0
    for identity, found in slices.items():
        ranks = {event["pid"] for _, event in found}
        if None in (identity[-1], *identity[:1]) or not 2 <= len(ranks) == len(found):
            continue  # nothing to join, or nobody counted it
        number += 1
        events = sorted((event for _, event in found), key=lambda event: (event["ts"], event["pid"]))
        for place, event in enumerate(events):
            phase = "s" if place == 0 else "f" if place == len(events) - 1 else "t"
            flow = {"ph": phase, "cat": "communication", "name": found[0][0].kind, "id": number, "ts": event["ts"]}
            flow |= {"pid": event["pid"], "tid": event["tid"]}
            yield {**flow, "bp": "e"} if phase == "f" else flow

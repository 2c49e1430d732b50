"""Joins what Python issued and what torch recorded into operations, and gives them to the communication logs.

[Note: joining] Each source sees what the other misses, see ``hook`` and ``flight_recorder``. A call of Python's
lies between two moments, and torch's entry of it, for the same group, was made between them: that is one operation. An
entry in no call was issued by C++; a call with no entry is of a kind that torch does not record. Torch's ring is read
*before* the list of calls is looked at, and a call is on the list before it begins: so an entry never misses its call.

One recorder serves all communication logs of a process. It starts a daemon thread, which reads torch's ring before it
overflows, and removes every hook when the last log stops.
"""

from __future__ import annotations

import bisect
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any

from ds_logging._comms.bandwidth import canonical_name
from ds_logging._comms.flight_recorder import Entry, Ring, rings
from ds_logging._comms.groups import Groups
from ds_logging._comms.hook import COMPOSITES, Hook, Issued, Span
from ds_logging._comms.operation import Operation
from ds_logging._step import step_at

Sink = Callable[[Operation], None]

POLL_SECONDS = 0.1
READ_AFTER = 1200
"""So many new operations make the thread read torch's ring, which holds 2,000 unless TORCH_FR_BUFFER_SIZE says more."""
REST, LONG_REST = 20, 100
"""Between two readings the thread rests this many times as long as the last one took, since it holds the GIL meanwhile.

It rests long where Python issued everything: then nothing is lost but sequence numbers and the device's times.
"""
FIRST_SECONDS = 0.05
"""How long a reading is taken to last before the first one."""
SETTLE_SECONDS = 1.0
"""A report waits so long, at most, for the device's times; a quarter of it for the ends of what C++ issued."""
UNNUMBERED = frozenset({"send", "recv", "barrier", *COMPOSITES})
"""What torch gives no number among a group's collectives, or not always."""
MOST_WAITING = 50_000
"""So many calls make the thread read at once, so that they do not pile up."""
CLAIM_NS = 10**9
"""The thread keeps operations for so long before it gives them to a log: `claim` may still name them."""
JOIN_SECONDS = 5.0
GIVE_UP_NS = 60 * 10**9
"""An operation that only Python saw, and for which nobody waits, is counted without an end after this time."""


@dataclass(slots=True)
class _Joined:
    """One operation that is not over, and where it was seen."""

    operation: Operation
    call: Issued | None
    entry: Entry | None


class Recorder:
    """See the module. Threads may share it; a signal handler may interrupt it."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._hook: Hook | None = None
        self._rings: list[Ring] = []
        self._calls: list[Issued] = []  # taken from the hook, not joined yet
        self._recent: list[Issued] = []  # the last ones that were joined
        self._joined: list[_Joined] = []  # not given to the logs yet
        self._launches: list[Entry] = []  # groups of calls, launched as one, that are not over
        self._counts: dict[tuple[object, ...], int] = {}  # of operations that torch does not number
        self._groups = Groups()
        self._backends: dict[str, bool] = {}  # whether torch's ring has shown operations of this backend
        self._timing = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._collecting = False
        self._last: deque[Operation] = deque(maxlen=256)  # of those that the logs got
        self.on_time_out: Callable[[], None] | None = None
        """Called on the thread whose wait for an operation has timed out, before the error goes on."""
        self.lost = 0
        """Operations that torch's ring dropped before they were read, and that Python did not issue either."""

    # ---- which logs record

    def add(self, sink: Sink, *, timing: bool) -> bool:
        """Give every operation from now on to ``sink``; say whether there is a torch.distributed to record.

        Args:
            sink: called with each operation once it is over, from whichever thread reads the ring.
            timing: ask the backend to measure on the device, where it offers that.
        """
        c10d = _c10d()
        if c10d is None:
            return False
        with self._lock:
            self.collect()
            if self._hook is None:
                self._hook = Hook(c10d)
                self._rings = rings(c10d)
                for ring in self._rings:
                    ring.skip()
                self._hook.on_time_out = self._timed_out
                self._hook.install()
                self.lost = 0
                self._stopped = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stopped,), name="ds-comms-log", daemon=True
                )
                self._thread.start()
            self._timing = self._timing or timing
            self._look_at_groups()
            self._sinks = [*self._sinks, sink]
        return True

    def remove(self, sink: Sink) -> list[str]:
        """Give ``sink`` what was issued up to now, over or not, and nothing more; return `not_seen`."""
        thread = None
        with self._lock:
            self.settle(final=self._sinks == [sink])
            not_seen = self.not_seen()
            self._sinks = [one for one in self._sinks if one != sink]
            if not self._sinks:
                thread = self._thread
                self._forget()
        # A thread inside C++ when the interpreter ends would abort the process. It may wait for the lock: join without.
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)
        return not_seen

    def _forget(self) -> None:
        self._stopped.set()
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._rings, self._timing, self._thread = None, [], False, None
        for kept in (self._calls, self._recent, self._joined, self._launches):
            kept.clear()
        self._counts.clear()
        self._backends.clear()
        self._last.clear()

    def after_fork(self) -> None:
        """Record nothing in a forked child: it has neither the thread nor the process groups."""
        self._lock = threading.RLock()
        self._collecting = False
        self._sinks = []
        self._stopped = threading.Event()
        self._forget()

    # ---- what callers say about operations

    @contextlib.contextmanager
    def span(self, name: str | None = None, *, hidden: bool = False) -> Iterator[Span]:
        """Name the operations that this thread issues in the ``with`` block, or leave them out."""
        hook = self._hook
        if hook is None:
            yield Span(name, hidden, None)
            return
        made = hook.open_span(name, hidden=hidden)
        try:
            yield made
        finally:
            hook.close_span(made)

    def claim(self, kind: str, name: str, latency_ms: float) -> bool:
        """Say that the last operation of this thread is the one that somebody measured; return whether there was one.

        DeepSpeed measures every operation of its own and appends it. The operation must be of that kind, and have been
        issued within the measured time (and a tenth of a second for what DeepSpeed does around it).
        """
        if self._hook is None:
            return False
        since = time.time_ns() - int(latency_ms * 1e6) - 10**8
        thread = threading.get_ident()
        with contextlib.suppress(RuntimeError):  # another thread issues one while we look
            for call in chain(reversed(self._hook.issued), reversed(self._recent)):
                if call.began_ns < since:
                    break
                if call.thread == thread and call.kind == kind:
                    if call.name is not None:
                        break
                    call.name = name
                    if call.latency_ms is None:
                        call.latency_ms = latency_ms
                    return True
        return False

    # ---- joining

    def settle(self, *, final: bool = False) -> None:
        """`collect`, and wait a moment for what torch notes a little after an operation has ended.

        Its watchdog notes the device's time; a thread of gloo notes the end of what C++ issued and waited for.
        """
        self.collect()
        began = time.monotonic()
        while self._is_late(time.monotonic() - began):
            time.sleep(0.01)
            self.collect()
        self.collect(final=final, untimed=True, read=False)

    def _is_late(self, waited: float) -> bool:
        timed = self._timing and waited < SETTLE_SECONDS
        ended = waited < SETTLE_SECONDS / 4
        return any(
            (timed and _awaits_time(one)) or (ended and one.call is None and not one.operation.completed)
            for one in list(self._joined)
        )

    def collect(self, *, final: bool = False, untimed: bool = False, keep_ns: int = 0, read: bool = True) -> None:
        """Join what there is and give the operations that are over to the sinks.

        Args:
            final: also those that are not over.
            untimed: also those whose device time torch may still note.
            keep_ns: not those that are younger than this.
            read: read torch's ring, which takes most of the time.
        """
        if self._hook is None:
            return
        with self._lock:
            if self._collecting:  # a signal handler interrupted us in this thread
                return
            self._collecting = True
            try:
                if read or final:
                    self._join(self._hook, final, read)
                self._deliver(final, untimed or not self._timing, keep_ns)
            finally:
                self._collecting = False

    def in_flight(self) -> list[Operation]:
        """Return the operations that were seen and are not over, oldest first."""
        return [operation for operation in self.latest() if not operation.completed]

    def latest(self) -> list[Operation]:
        """Return the last operations, over or not, oldest first."""
        self.collect()
        inside = [self._operation(call, None) for call in list(self._calls)]  # waiting within the call itself
        everything = [*list(self._last), *(one.operation for one in list(self._joined)), *inside]
        return sorted(everything, key=lambda operation: operation.started_ns)

    def _timed_out(self) -> None:
        if self.on_time_out is not None:
            self.on_time_out()

    def _join(self, hook: Hook, final: bool, read: bool) -> None:
        self._look_at_groups()
        hook.forget_dropped()
        began = time.time_ns()
        lost_before = sum(ring.lost for ring in self._rings)
        entries = [entry for ring in self._rings for entry in ring.read()] if read else []
        calls = self._calls + [hook.issued.popleft() for _ in range(len(hook.issued))]
        self._calls = []

        by_group: dict[str, list[Entry]] = {}
        for entry in sorted(entries, key=lambda entry: entry.created_ns):
            by_group.setdefault(entry.group[0], []).append(entry)
        moments = {group: [entry.created_ns for entry in found] for group, found in by_group.items()}
        used: set[int] = set()
        missed = 0
        for call in calls:
            if call.kind in COMPOSITES:
                if final or call.returned_ns:
                    self._add(call, None)
                else:
                    self._calls.append(call)
                continue
            name = call.group.group_name
            first = bisect.bisect_left(moments.get(name, ()), call.began_ns)
            last = bisect.bisect_right(moments.get(name, ()), call.returned_ns or began)
            mine = [entry for entry in by_group.get(name, ())[first:last] if id(entry) not in used]
            if mine:
                used.update(map(id, mine))
                self._backends[call.group.name()] = True
                self._add(call, next((entry for entry in mine if entry.duration_ms is not None), mine[0]))
            elif final or 0 < call.returned_ns < began:
                if call.kind not in UNNUMBERED:
                    missed += 1
                    self._backends.setdefault(call.group.name(), False)
                self._add(call, None)
            else:  # its entry may come yet
                self._calls.append(call)
        for entry in entries:
            if entry.operation.endswith(":coalesced"):
                self._launches.append(entry)
            elif id(entry) not in used:
                self._add(None, entry)
        self._end_launches()
        self._recent = calls[-32:] or self._recent
        lost = sum(ring.lost for ring in self._rings) - lost_before
        self.lost += max(0, lost - missed)

    def _end_launches(self) -> None:
        """End the parts of launches that are over: torch follows the launch, and leaves its parts as they were."""
        over = {(entry.group, entry.launch) for entry in self._launches if entry.over}
        self._launches = [entry for entry in self._launches if not entry.over]
        for joined in self._joined if over else ():
            entry = joined.entry
            if entry is not None and not entry.over and (entry.group, entry.launch) in over:
                entry.over = entry.retired = True

    def _add(self, call: Issued | None, entry: Entry | None) -> None:
        operation = self._operation(call, entry)
        operation.sequence = self._sequence(operation, call, entry)
        self._joined.append(_Joined(operation, call, entry))

    def _operation(self, call: Issued | None, entry: Entry | None) -> Operation:
        if call is not None:
            group, description = call.group.group_name, call.group.group_desc
            kind, began, thread = call.kind, call.began_ns, call.thread
        elif entry is not None:
            (group, description), began, thread = entry.group, entry.created_ns, 0
            kind = canonical_name(entry.operation)
        nbytes, dtype = 0, ""
        if call is not None and call.nbytes >= 0:
            nbytes, dtype = call.nbytes, str(call.dtype).removeprefix("torch.")
        elif entry is not None:
            nbytes, dtype = entry.nbytes, entry.dtype
        ranks = self._groups.ranks_of(None if call is None else call.group, group)
        return Operation(
            kind=kind,
            group=f"{group}:{description}" if description and description != "undefined" else group,
            ranks=ranks,
            sequence=None,
            nbytes=nbytes,
            dtype=dtype,
            started_ns=began,
            latency_ms=None,
            completed=False,
            name=kind,
            peer=ranks[call.peer] if call is not None and call.peer is not None and ranks else None,
            step=step_at(began),
            thread=thread,
            group_size=len(ranks) if ranks else None if call is None else call.group.size(),
        )

    def _sequence(self, operation: Operation, call: Issued | None, entry: Entry | None) -> int | None:
        if operation.kind in ("send", "recv"):
            if operation.peer is None:
                return None
            key: tuple[object, ...] = (operation.group, operation.kind, operation.peer)
        elif entry is not None:
            return entry.sequence
        elif operation.kind in UNNUMBERED or call is None or self._backends.get(call.group.name()):
            return None  # torch numbers the collectives of this backend, and did not number this one
        else:
            key = (operation.group,)
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]

    def _deliver(self, final: bool, untimed: bool, keep_ns: int) -> None:
        now = time.time_ns()
        still: list[_Joined] = []
        for joined in sorted(self._joined, key=lambda joined: joined.operation.started_ns):
            operation, call = joined.operation, joined.call
            over = _finish(operation, call, joined.entry, now)
            if not untimed and not final and _awaits_time(joined):
                over = False
            if not final and (not over or now - operation.started_ns < keep_ns):
                still.append(joined)
                continue
            if call is not None and call.span is not None:
                if call.span.hidden:
                    continue
                operation.name = call.span.name or operation.name
            if call is not None and call.name is not None:
                operation.name = call.name
            if operation.completed:  # the others failed, or nobody saw their end: they hold up nobody
                self._last.append(operation)
            for sink in self._sinks:
                sink(operation)
        self._joined = still

    def not_seen(self) -> list[str]:
        """Return what this torch cannot show, a sentence each."""
        found = [
            f"torch keeps no record of operations of {backend}: those that C++ issues (DDP, compiled code) are not seen"
            for backend, shown in sorted(self._backends.items())
            if not shown
        ]
        if self.lost:
            found.append(
                f"{self.lost} operations that C++ issued left torch's record before they were read: "
                "set TORCH_FR_BUFFER_SIZE to more than 2000 before init_process_group"
            )
        return found

    def _look_at_groups(self) -> None:
        if self._groups.look(timing=self._timing):  # the names and numbers of groups begin anew
            self._counts.clear()
            self._last.clear()

    # ---- the thread

    def _run(self, stopped: threading.Event) -> None:
        read = self._recorded()
        ready, took = time.monotonic(), FIRST_SECONDS  # when the last reading ended, and how long it took
        while not stopped.wait(POLL_SECONDS):
            hook = self._hook
            if hook is None or stopped.is_set():
                return
            with self._lock:
                self._look_at_groups()  # while they exist
            waiting, recorded = len(hook.issued), self._recorded()
            rested = time.monotonic() - ready
            only_torch_saw = recorded - read - waiting
            ripe = (only_torch_saw >= READ_AFTER and rested >= REST * took) or (
                max(waiting, recorded - read) >= READ_AFTER and rested >= LONG_REST * took
            )
            if ripe or waiting >= MOST_WAITING:
                began = time.monotonic()
                self.collect(keep_ns=CLAIM_NS)
                ready = time.monotonic()
                read, took = recorded, ready - began

    def _recorded(self) -> int:
        return sum(ring.enqueued() for ring in self._rings)


def _awaits_time(joined: _Joined) -> bool:
    """Say whether an operation is over on its device and torch has not noted its time yet."""
    call, entry = joined.call, joined.entry
    on_host = call is not None and call.on_host
    return entry is not None and not on_host and entry.over and not entry.retired


def _finish(operation: Operation, call: Issued | None, entry: Entry | None, now: int) -> bool:
    """Write into ``operation`` how it ended; say whether it is over, as far as anybody will ever know."""
    if call is not None and call.latency_ms is not None:
        operation.latency_ms = call.latency_ms
    if call is not None and call.failed:
        return True
    if call is not None and call.on_host:
        operation.completed = call.over or (entry is not None and entry.over and not call.waited)
        return operation.completed or (entry is None and now - call.began_ns > GIVE_UP_NS)
    if entry is None:  # on a device, and torch has no record of it: nobody sees its end
        return True
    if entry.duration_ms is not None:
        operation.latency_ms = entry.duration_ms
    operation.completed = entry.over
    return entry.over


def _c10d() -> Any:
    """Return torch's module of process groups; ``None`` without torch, or with one that was built without it."""
    if "torch" not in sys.modules:
        if find_spec("torch") is None:
            return None
        import_module("torch.distributed")
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available():
        return None
    return sys.modules["torch._C._distributed_c10d"]


recorder = Recorder()
"""The one of this process."""

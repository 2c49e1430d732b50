"""Explains a hang: asks every rank, through the store, what it is doing.

[Note: asking] The rank that asks adds 1 to a counter in the store. On every rank a thread looks at that counter; when
it has grown, the thread writes what its rank does. So a rank answers also while its main thread waits inside a
collective, which releases the GIL. The asker takes what has come until its time is over. No collective is used.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from ds_logging._comms.operation import Operation
from ds_logging._hang.reasons import explain_states
from ds_logging._hang.states import RankState
from ds_logging._log.logger import logger
from ds_logging.errors import ArgumentError

PREFIX = "ds_logging_hang"
_MOST_REQUESTS = 8  # answered at once; more have waited too long for an answer


class _Alarm(NamedTuple):
    """An explanation that some rank made, and the rank that shall log it."""

    time_ns: int
    rank: int
    text: str


class HangExplainer:
    """Answers other ranks, and asks them.

    Args:
        store: a ``torch.distributed`` store that all ranks share. A connection of its own is made where it can be.
        rank: of this process.
        world_size: number of ranks.
        read_state: returns what this rank is doing. Other threads than the main one call it.
        hang_after: seconds after which `check` takes an operation in flight for a hang; ``None``: never.
        timeout: seconds that `explain` waits for answers.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        read_state: Callable[[], RankState],
        *,
        hang_after: float | None = None,
        timeout: float = 3.0,
    ) -> None:
        for name, value in (("hang_after", hang_after), ("timeout", timeout)):
            if value is not None and not 0 < value < float("inf"):
                raise ArgumentError(f"{name}={value!r}: give seconds, more than 0")
        self._store = _own_connection(store)
        self._rank = rank
        self._world_size = world_size
        self._read_state = read_state
        self._hang_after = hang_after
        self._timeout = timeout
        self._asked_before = False
        self._answered = 0
        self._logged = False  # this hang
        self._lost_ns: int | None = None  # when another rank took it over to explain this hang
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, *, poll_seconds: float = 0.5) -> None:
        """Answer on a thread until `stop`.

        Args:
            poll_seconds: how often it looks whether somebody asks.
        """
        if self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(
                target=self._answer_until_stopped, args=(poll_seconds,), name="ds-logging-hang", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Answer no more. A thread inside C++ (the store) when the interpreter ends would abort the process."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None

    def _answer_until_stopped(self, poll_seconds: float) -> None:
        while not self._stopping.wait(poll_seconds):
            self.poll()

    def poll(self) -> bool:
        """Like `answer_once`, but say whether the store still answers instead of raising."""
        try:
            self.answer_once()
        except Exception:  # the store's end is no reason to end the program
            return False
        return True

    def answer_once(self) -> int:
        """Write this rank's state for every rank that has asked since the last time, and return how many did."""
        with self._lock:
            asked = self._requests()
            new = range(max(self._answered, asked - _MOST_REQUESTS) + 1, asked + 1)
            if new:
                text = json.dumps(self._own_state().to_json())
                for number in new:
                    self._store.set(f"state/{number}/{self._rank}", text)
            self._answered = asked
            return len(new)

    def _requests(self) -> int:
        if not self._asked_before and not self._store.check(["requests"]):
            return 0
        self._asked_before = True
        return int(self._store.get("requests"))

    def _own_state(self) -> RankState:
        try:
            return self._read_state()
        except Exception as error:
            return RankState((), time.time_ns(), f"{type(error).__name__}: {error}")

    def explain(self, timeout: float | None = None) -> str:
        """Ask every rank and return in words who waits for whom. Never raises; one rank alone may call it.

        Args:
            timeout: seconds to wait for answers, `HangExplainer`'s unless given.
        """
        return self._explain(timeout)[0]

    def _explain(self, timeout: float | None = None) -> tuple[str, Mapping[int, RankState | None]]:
        states: dict[int, RankState | None] = dict.fromkeys(range(self._world_size))
        note = ""
        try:
            states[self._rank] = self._own_state()
            self._collect(states, time.monotonic() + (self._timeout if timeout is None else timeout))
        except Exception as error:
            note = f"\n- The store fails, so ranks may be well that seem not to answer: {type(error).__name__}: {error}"
        return f"hang explanation: {explain_states(states)}{note}", states

    def _collect(self, states: dict[int, RankState | None], deadline: float) -> None:
        number = self._store.add("requests", 1)
        while True:
            self.answer_once()  # this thread may be the one that answers, and another rank may ask at the same time
            for rank, state in states.items():
                if state is None and self._store.check([f"state/{number}/{rank}"]):
                    states[rank] = RankState.from_json(json.loads(self._store.get(f"state/{number}/{rank}")))
            if time.monotonic() >= deadline or all(state is not None for state in states.values()):
                break
            time.sleep(0.05)
        for rank in states:
            with contextlib.suppress(Exception):  # not every store deletes
                self._store.delete_key(f"state/{number}/{rank}")

    def check(self, now_ns: int, in_flight: Iterable[Operation], *, timed_out: bool = False) -> None:
        """Log an explanation, at ERROR and once a hang, if an operation has been in flight for too long.

        Call it on every rank now and then, from a thread. One of the ranks that wait asks; the lowest of them logs.

        Args:
            now_ns: ``time.time_ns()``.
            in_flight: the operations of this rank that are not over.
            timed_out: whether a wait for one of them has failed. The rank that asks logs then, since it may end.
        """
        in_flight = list(in_flight)
        if not timed_out and (self._hang_after is None or not self._overdue(now_ns, in_flight)):
            self._logged, self._lost_ns = False, None
            return
        if self._logged:
            return
        oldest_ns = min((op.started_ns for op in in_flight if not op.completed), default=now_ns)
        try:
            alarm = self._alarm(now_ns, oldest_ns, timed_out)
        except Exception as error:  # the store has ended, with rank 0 perhaps: this rank says what it knows
            logger.debug("the store fails: %s", error)
            alarm = _Alarm(now_ns, self._rank, self.explain())
        if alarm is not None:
            self._logged = True
            if alarm.rank == self._rank:
                logger.error("%s", alarm.text)

    def _overdue(self, now_ns: int, operations: Iterable[Operation], share: float = 1.0) -> bool:
        limit_ns = (self._hang_after or 0.0) * share * 1e9
        return any(not op.completed and now_ns - op.started_ns > limit_ns for op in operations)

    def _alarm(self, now_ns: int, oldest_ns: int, timed_out: bool) -> _Alarm | None:
        """Return the explanation of this hang: another rank's, or the own one if this rank is the one to ask."""
        fresh_ns = max(self._hang_after or 0.0, 4 * self._timeout) * 1e9
        if self._store.check(["alarm"]):
            latest = _Alarm(*json.loads(self._store.get("alarm")))
            if oldest_ns < latest.time_ns and now_ns - latest.time_ns < fresh_ns:
                return latest
        # Of the ranks that know of the same number of requests, one is the first.
        first = self._store.add(f"asker/{self._requests()}", 1) == 1
        if not first and self._lost_ns is None:
            self._lost_ns = now_ns
        if not first and (timed_out or now_ns - (self._lost_ns or now_ns) < 3 * self._timeout * 1e9):
            return None  # its explanation comes; if it does not, that rank has ended
        text, states = self._explain()
        waiting = [
            rank
            for rank, state in states.items()
            if state is not None and self._overdue(state.now_ns, state.in_flight(), share=0.5)
        ]
        alarm = _Alarm(now_ns, self._rank if timed_out else min(waiting, default=self._rank), text)
        self._store.set("alarm", json.dumps(alarm))
        return alarm


def _own_connection(store: Any) -> Any:
    """Return the store under a prefix, through a connection that a blocked main thread does not hold."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not isinstance(store, getattr(dist, "Store", ())):
        return store
    own: Any = store
    try:
        own = own.clone()
    except (AttributeError, RuntimeError, NotImplementedError):  # older torch, or a store of threads
        pass
    else:
        own.set_timeout(timedelta(seconds=10))
    return dist.PrefixStore(PREFIX, own)

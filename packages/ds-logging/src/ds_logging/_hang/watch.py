"""Watches a recording process for hangs: at a signal, after a time-out, after a time, and when somebody asks."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

from ds_logging._comms.recorder import recorder
from ds_logging._hang.explainer import HangExplainer
from ds_logging._hang.signals import SignalListener
from ds_logging._hang.states import RankState, state_of

POLL_SECONDS = 1.0
JOIN_SECONDS = 5.0


class HangWatch:
    """Keeps one `HangExplainer` for the default process group of the moment.

    Args:
        hang_after: seconds after which an operation in flight counts as a hang; ``None``: never.
        hang_signal: a signal at which this rank writes an explanation to standard error; ``None``: none.
    """

    def __init__(self, *, hang_after: float | None, hang_signal: int | None) -> None:
        self._hang_after = hang_after
        self._hang_signal = hang_signal
        self._explainer: HangExplainer | None = None
        self._world: Any = None
        self._stopping = threading.Event()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._listener: SignalListener | None = None

    def start(self) -> None:
        """Watch until `stop`. The signal is listened to where this is the main thread."""
        self._stopping = threading.Event()
        if self._hang_signal is not None and threading.current_thread() is threading.main_thread():
            listener = SignalListener(self._hang_signal, self._write_explanation)
            if listener.start():
                self._listener = listener
        recorder.on_time_out = self._explain_time_out
        self._thread = threading.Thread(target=self._watch, args=(self._stopping,), name="ds-comms-hang", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more, and give the signal back. On the main thread where it was started there."""
        self._stopping.set()
        if recorder.on_time_out == self._explain_time_out:
            recorder.on_time_out = None
        if self._listener is not None and threading.current_thread() is threading.main_thread():
            self._listener.stop()
            self._listener = None
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        self._thread = None
        self._forget()

    def explain(self, timeout: float | None = None) -> str:
        """Ask every rank and say who waits for whom; any rank may call it alone."""
        explainer = self._current()
        if explainer is None:
            return "hang explanation: there is no process group, so no rank waits for another"
        try:
            return explainer.explain(timeout)
        finally:
            if self._thread is None:  # nobody watches: leave no thread behind
                self._forget()

    def after_fork(self) -> None:
        """Forget, in a forked child, what its parent's threads do."""
        self._lock = threading.RLock()  # one of them may hold the old one
        self._thread = self._explainer = self._world = None

    def _watch(self, stopping: threading.Event) -> None:
        every = None if self._hang_after is None else self._hang_after / 4
        checked = time.monotonic()
        while not stopping.wait(POLL_SECONDS if every is None else min(POLL_SECONDS, every)):
            explainer = self._current()
            if explainer is not None and every is not None and time.monotonic() - checked >= every:
                checked = time.monotonic()
                explainer.check(time.time_ns(), recorder.in_flight())

    def _current(self) -> HangExplainer | None:
        """Return the explainer of the default process group, a new one where that has changed."""
        dist: Any = sys.modules.get("torch.distributed")
        world = dist.group.WORLD if dist is not None and dist.is_available() and dist.is_initialized() else None
        with self._lock:
            if world is not self._world:
                self._forget()
                with contextlib.suppress(Exception):  # destroyed at this moment: the next poll looks again
                    if world is not None:
                        store = dist.distributed_c10d._get_default_store()
                        rank, size = dist.get_rank(), dist.get_world_size()
                        self._explainer = HangExplainer(store, rank, size, _read_state, hang_after=self._hang_after)
                        self._explainer.start(poll_seconds=POLL_SECONDS)
                    self._world = world
            return self._explainer

    def _forget(self) -> None:
        with self._lock:
            if self._explainer is not None:
                self._explainer.stop()
            self._explainer, self._world = None, None

    def _write_explanation(self) -> None:
        with contextlib.suppress(Exception):  # a closed standard error hears nothing
            print(self.explain(), file=sys.stderr, flush=True)

    def _explain_time_out(self) -> None:
        explainer = self._current()
        if explainer is not None:
            explainer.check(time.time_ns(), recorder.in_flight(), timed_out=True)


def _read_state() -> RankState:
    return state_of(recorder.latest(), time.time_ns())

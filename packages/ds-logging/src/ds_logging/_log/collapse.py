"""Show a line that many ranks say alike once. What ``configure(collapse=True)`` does.

[Note: collapsed lines] Rank 0 shows its lines at once and puts a key for each into the store of torch.distributed. The
other ranks hold a line back for up to `PATIENCE` seconds. If rank 0 has said the same, they report it into a mailbox in
the store; rank 0 reads that, shows one line that names the ranks, and acknowledges. A line without an answer, for
whatever reason, is shown by its own rank: late, but not lost. Lines from ERROR on are never held back, nor are those of
`log_dist` with ``in_order=True``. All of this is done by one daemon thread; the caller only puts the record into a
queue.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_logging._log.formatters import STANDARD
from ds_logging._log.in_order import has_turn
from ds_logging._log.message import RankedMessage
from ds_logging._rank import current_position, worker_id

if TYPE_CHECKING:
    from ds_logging._log.handlers import LogHandler

PATIENCE = 1.0  # seconds that a rank waits for rank 0 to say the same
ANSWER = 4.0  # seconds until a report must be acknowledged
PERIOD = 1.0  # seconds between two lines about other ranks
POLL = 0.1  # seconds
FORGET = 30.0  # seconds after which rank 0 forgets a line
MAX_LINES = 10_000  # held or remembered


@dataclass
class _Line:
    key: str
    text: str
    record: logging.LogRecord
    handler: LogHandler
    since: float
    ranks: dict[int, int] = field(default_factory=dict)  # rank 0: who said the same, with the number of the report
    report: int | None = None  # other ranks: the number of the report


class Collapser:
    """Holds lines back and compares them with those of rank 0. See [Note: collapsed lines]."""

    def __init__(self) -> None:
        self._incoming: queue.SimpleQueue[_Line] = queue.SimpleQueue()
        self._lines: dict[str, _Line] = {}
        self._said: Counter[str] = Counter()
        self._worker: threading.Thread | None = None
        self._pid = 0
        self._rank = 0
        self._world_size = 1
        self._store: Any = None
        self._read = 0  # rank 0: reports read
        self._last_summary = 0.0
        self._stop = threading.Event()

    def keep(self, record: logging.LogRecord, handler: LogHandler) -> bool:
        """Say whether the record is taken care of; else the caller shows it now."""
        if record.levelno >= logging.ERROR or has_turn() or self._stop.is_set() or worker_id() is not None:
            return False
        if self._worker is None and not self._start():
            return False
        if self._pid != os.getpid():  # a forked child has no thread
            return False
        try:
            message = record.msg
            text = message.text() if isinstance(message, RankedMessage) else record.getMessage()
        except Exception:
            return False
        name = f"{record.levelno} {record.pathname}:{record.lineno} {text}"
        if len(self._said) > MAX_LINES:
            self._said.clear()
        self._said[name] += 1
        digest = hashlib.sha256(f"{self._said[name]} {name}".encode("utf-8", "replace")).hexdigest()[:24]
        if self._incoming.qsize() + len(self._lines) > MAX_LINES:
            return False
        self._incoming.put(_Line(digest, text, record, handler, time.monotonic()))
        return self._rank != 0

    def _start(self) -> bool:
        position = current_position()
        c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
        if c10d is None or not c10d.is_initialized() or (position.world_size or 1) < 2:
            return False
        try:
            store = c10d._get_default_store()
            with contextlib.suppress(Exception):
                store = store.clone()  # a connection of its own: the training's may be waiting for a rank
            self._store = c10d.PrefixStore("ds_logging/collapse", store)
        except Exception:
            return False
        self._pid, self._rank, self._world_size = os.getpid(), position.rank, position.world_size or 1
        self._worker = threading.Thread(target=self._run, name="ds_logging collapse", daemon=True)
        self._worker.start()
        atexit.register(self.finish)
        return True

    def finish(self) -> None:
        """Show what is still held; wait a moment for the other ranks' reports. Called at exit."""
        if self._stop.is_set() or self._pid != os.getpid():
            return
        self._stop.set()
        if self._worker is not None:
            self._worker.join(ANSWER + 2 * PATIENCE)

    def _run(self) -> None:
        step = self._first_rank if self._rank == 0 else self._other_rank
        deadline = 0.0
        while True:
            stopping = self._stop.is_set()
            if stopping and not deadline:
                deadline = time.monotonic() + (2 * PATIENCE if self._rank == 0 else ANSWER)
            try:
                step(stopping)
            except Exception:  # the store is gone: its host has ended
                self._store = None
            if self._store is None or (stopping and (not self._lines or time.monotonic() > deadline)):
                break
            if not stopping:
                self._stop.wait(POLL)
            else:
                time.sleep(POLL)
        self._stop.set()
        self._take()
        for line in list(self._lines.values()):
            if self._rank != 0:
                line.handler.show(line.record)
        if self._rank == 0:
            with contextlib.suppress(Exception):
                self._summarise()
        self._lines.clear()

    def _take(self) -> list[_Line]:
        new = []
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._incoming.get_nowait()
                self._lines[line.key] = line
                new.append(line)
        return new

    def _first_rank(self, stopping: bool) -> None:
        now = time.monotonic()
        for line in self._take():
            self._store.set(f"said/{line.key}", "")
        reports = self._store.add("reports", 0)
        while self._read < reports and self._store.check([f"report/{self._read + 1}"]):
            self._read += 1
            key, _, rank = self._store.get(f"report/{self._read}").decode().partition(" ")
            found = self._lines.get(key)
            if found is not None:  # else it was forgotten: no answer, and the rank shows it
                found.ranks[int(rank)] = self._read
        waiting = [line for line in self._lines.values() if line.ranks]
        complete = waiting and all(len(line.ranks) == self._world_size - 1 for line in waiting)
        late = waiting and now - min(line.since for line in waiting) > 2 * PATIENCE
        if waiting and now - self._last_summary >= PERIOD and (complete or late):
            self._summarise()
        for line in list(self._lines.values()):
            if not line.ranks and now - line.since > (2 * PATIENCE if stopping else FORGET):
                del self._lines[line.key]
                self._store.delete_key(f"said/{line.key}")

    def _summarise(self) -> None:
        waiting = [line for line in self._lines.values() if line.ranks]
        if not waiting:
            return
        self._last_summary = time.monotonic()
        by_ranks: dict[tuple[int, ...], list[_Line]] = {}
        for line in waiting:
            by_ranks.setdefault(tuple(sorted(line.ranks)), []).append(line)
        parts = []
        for ranks, lines in by_ranks.items():
            texts = [repr(line.text if len(line.text) <= 80 else line.text[:77] + "...") for line in lines[:3]]
            more = f" and {len(lines) - 3} more lines" if len(lines) > 3 else ""
            parts.append(f"{_spell(ranks)} said the same: {', '.join(texts)}{more}")
        last = waiting[-1]
        place = {name: value for name, value in vars(last.record).items() if name in STANDARD}  # but not its extras
        record = logging.makeLogRecord({**place, "msg": "; ".join(parts), "args": (), "exc_info": None})
        record.rank_tag = f"[Rank {self._rank}] "
        last.handler.show(record)
        for line in waiting:
            for number in line.ranks.values():
                self._store.set(f"answer/{number}", "")
                self._store.delete_key(f"report/{number}")
            if len(line.ranks) == self._world_size - 1:
                del self._lines[line.key]
                self._store.delete_key(f"said/{line.key}")
            else:
                line.ranks = {}

    def _other_rank(self, stopping: bool) -> None:
        self._take()
        now = time.monotonic()
        for line in list(self._lines.values()):
            if line.report is not None:
                if self._store.check([f"answer/{line.report}"]):
                    self._store.delete_key(f"answer/{line.report}")
                    del self._lines[line.key]
                elif now - line.since > ANSWER + PATIENCE:
                    self._show(line)
            elif self._store.check([f"said/{line.key}"]):
                line.report = self._store.add("reports", 1)
                self._store.set(f"report/{line.report}", f"{line.key} {self._rank}")
            elif now - line.since > PATIENCE:
                self._show(line)

    def _show(self, line: _Line) -> None:
        del self._lines[line.key]
        line.handler.show(line.record)


def _spell(ranks: tuple[int, ...]) -> str:
    """Return ranks as they are written in ``ranks=``: ``"ranks 1-3,7"``."""
    parts: list[str] = []
    first = previous = ranks[0]
    for rank in (*ranks[1:], None):
        if rank is not None and rank == previous + 1:
            previous = rank
            continue
        parts.append(str(first) if first == previous else f"{first}-{previous}")
        if rank is not None:
            first = previous = rank
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {','.join(parts)}"

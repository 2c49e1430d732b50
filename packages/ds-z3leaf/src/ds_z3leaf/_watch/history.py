"""What one rank called lately, in a ring of fixed size, and where it stands now."""

from __future__ import annotations

import json
import sys
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

KEPT = 1 << 14  # events; about 100 kB

_BACKWARD = "_engine_run_backward"  # the frame of torch in which a backward waits


@dataclass(frozen=True)
class Report:
    """What a rank tells the others.

    Attributes:
        events: its last events ([Note: events] in ``_rehearse/calls.py``).
        total: how many events there were since `watch` was entered, those included that are kept no more.
        counted: how many of them were of modules that the engine gathers for.
        stack: the modules that it is in, the outermost first.
        index: the digest of its modules, equal where the models are.
        place: where its thread stands, in words, without the module.
        idle: seconds since its last event.
        left: None inside the block, else how it left it, in words.
    """

    events: list[int]
    total: int
    counted: int
    stack: list[int]
    index: str
    place: str
    idle: float
    left: str | None = None

    def pack(self) -> bytes:
        """For the store."""
        return zlib.compress(json.dumps(asdict(self)).encode())

    @staticmethod
    def unpack(packed: bytes) -> Report:
        """From the store."""
        return Report(**json.loads(zlib.decompress(packed)))


class History:
    """Takes events and keeps the last ones.

    Args:
        counted: by number, whether events of that module count as gathers of the engine.
        thread: the identifier of the thread that runs the model.
        kept: how many events to keep.
    """

    def __init__(self, counted: Sequence[bool], thread: int, kept: int = KEPT) -> None:
        self._counts = counted
        self._thread = thread
        self._events: deque[int] = deque(maxlen=kept)
        self._stack: list[int] = []
        self._unwound: list[int] = []  # leaves of modules that an exception passes through
        self._outer: Any = None  # the exception that was being handled when the outermost module was entered
        self.total = 0
        self._counted = 0

    def write(self, event: int) -> None:
        """Take one event.

        Modules that an exception leaves stay entered until another module is: a rank that fails in a module has not
        gone on where another rank is still in it.
        """
        if event >= 0:
            if self._unwound:
                unwound, self._unwound = self._unwound, []
                for leave in unwound:
                    self._append(leave)
            if not self._stack:
                self._outer = sys.exc_info()[1]
        else:
            error = sys.exc_info()[1]
            if error is not None and error is not self._outer:
                self._unwound.append(event)
                return
        self._append(event)

    def _append(self, event: int) -> None:
        if event >= 0:
            self._stack.append(event)
            self._counted += self._counts[event]
        else:
            while self._stack and self._stack.pop() != ~event:
                pass
            self._counted += self._counts[~event]
        self._events.append(event)
        self.total += 1

    def report(self, index: str, idle: float, left: str | None = None) -> Report:
        """What to tell the others. May be called from another thread while the model runs."""
        frame = sys._current_frames().get(self._thread)
        return Report(
            list(self._events),
            self.total,
            self._counted,
            list(self._stack),
            index,
            _place(frame, bool(self._stack)),
            idle,
            left,
        )


def _place(frame: FrameType | None, inside: bool) -> str:
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    backward = any(entry.f_code.co_name == _BACKWARD for entry in frames)
    where = "in backward" if backward else "in the forward" if inside else "between forwards"
    if not frames:
        return where
    own = next((entry for entry in frames if not _of_library(entry)), frames[0])
    innermost = "" if own is frames[0] else f"{frames[0].f_code.co_name}() called from "
    return f"{where}, at {innermost}{Path(own.f_code.co_filename).name}:{own.f_lineno}"


def _of_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return "site-packages" in name or name.startswith("<") or str(frame.f_globals.get("__name__")).startswith("torch.")

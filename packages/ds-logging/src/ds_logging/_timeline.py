"""Where ranges are reported to while a communication log records, so that they stand on its timeline."""

from __future__ import annotations

from collections.abc import Callable

RangeListener = Callable[[str, int, int, int], None]
"""Called at the end of a range with its name, its start and its end (``time.time_ns``), and its thread's identifier."""

listener: RangeListener | None = None
"""Set by a communication log while it records, and read by ``nvtx`` at the start of each range."""

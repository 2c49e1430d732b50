"""Write one line whole: to a stream, or to a file of this rank.

[Note: one write] A line goes out as one ``os.write`` where the stream stands on a file descriptor. So lines of several
ranks, threads and forked children that share the descriptor do not mix; a signal handler that logs in the middle of a
line's write is no error; and a child that was forked while another thread wrote finds no lock of the stream taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import string
import sys
from pathlib import Path
from typing import Any, TextIO

from ds_logging._rank import current_rank, local_rank
from ds_logging.errors import ArgumentError

PATIENCE = 5.0  # seconds to wait for a descriptor that does not block and is full
PLACEHOLDERS = ("rank", "local_rank", "host", "pid")


class StreamWriter:
    """Writes lines to a stream, or to whatever ``sys.stderr`` or ``sys.stdout`` is at that moment."""

    def __init__(self, stream: TextIO | None, name: str = "stderr") -> None:
        self._stream = stream
        self._name = name
        self._known: tuple[Any, int] | None = None  # a stream and its file descriptor
        if stream is not None:
            with contextlib.suppress(Exception):
                stream.flush()  # what the caller wrote before stands before the first line

    def current(self) -> TextIO | None:
        """Return the stream; ``None`` in a process without a console."""
        return getattr(sys, self._name) if self._stream is None else self._stream

    def write(self, line: str) -> None:
        """Write a line and its newline."""
        stream = self.current()
        if stream is None:
            return
        text = line + "\n"
        known = self._known
        if known is not None and known[0] is stream and not stream.closed and "write" not in vars(stream):
            descriptor: int | None = known[1]
        else:
            descriptor = _descriptor(stream)
            self._known = None if descriptor is None else (stream, descriptor)
        if descriptor is not None:
            if stream is sys.stdout:  # print() fills its buffer; keep the order. No lock is waited for elsewhere.
                with contextlib.suppress(RuntimeError):  # a signal handler in the middle of a print()
                    stream.flush()
            encoding, errors = stream.encoding or "utf-8", stream.errors or "strict"
            write_whole(descriptor, _encode(text, encoding, errors))
            return
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def _descriptor(stream: Any) -> int | None:
    """Return the file descriptor of a plain text file; ``None`` for anything that may do more than write to it.

    Somebody who replaces ``stream.write``, or wraps the stream (a notebook, a tee, pytest), wants to see the text.
    """
    if type(stream) is not io.TextIOWrapper or "write" in vars(stream):
        return None
    try:
        buffer = stream.buffer
        raw = buffer.raw if type(buffer) is io.BufferedWriter else buffer
        return raw.fileno() if type(raw) is io.FileIO else None
    except (AttributeError, ValueError, OSError):
        return None


def _encode(text: str, encoding: str, errors: str) -> bytes:
    try:
        return text.encode(encoding, errors)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace")


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all bytes, in one system call unless the system takes fewer."""
    while data:
        try:
            written = os.write(descriptor, data)
        except BlockingIOError:
            if not select.select([], [descriptor], [], PATIENCE)[1]:
                raise
            continue
        if written == len(data):
            return
        data = data[written:]


class FileWriter:
    """Appends lines to a file whose name may hold ``{rank}``, ``{local_rank}``, ``{host}`` and ``{pid}``.

    The file is opened at the first line, when the rank is known, and again when the rank or the process is another
    one: after ``init_process_group``, in a forked child. Ranks that share a file append whole lines to it.
    """

    def __init__(self, template: str | os.PathLike[str]) -> None:
        try:
            self._template = os.fspath(template)
        except TypeError:
            raise ArgumentError(f"file={template!r} is no path; write for example 'logs/run-{{rank}}.log'") from None
        if not isinstance(self._template, str) or not self._template:
            raise ArgumentError(f"file={template!r} is no path; write for example 'logs/run-{{rank}}.log'")
        self._open: tuple[tuple[int, int], str, int] | None = None  # (rank, process), path, descriptor
        self._check()

    def _check(self) -> None:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self._template) if name is not None]
            path = Path(self.path(0))
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise ArgumentError(f"file={self._template!r}: {error}; use {', '.join(PLACEHOLDERS)} in braces") from None
        unknown = [name for name in fields if name not in PLACEHOLDERS]
        if unknown:
            raise ArgumentError(f"file={self._template!r}: {unknown} unknown; use {', '.join(PLACEHOLDERS)} in braces")
        if path.is_dir():
            raise ArgumentError(f"file={self._template!r} is a folder; name a file in it")
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ArgumentError(f"file={self._template!r}: {str(folder)!r} is no folder that can be written to")

    def path(self, rank: int) -> str:
        """Return the path of a rank's file."""
        local = local_rank()
        return self._template.format(
            rank=rank, local_rank=rank if local is None else local, host=socket.gethostname(), pid=os.getpid()
        )

    def write(self, line: str) -> None:
        """Append a line and its newline."""
        key = (current_rank(), os.getpid())
        opened = self._open
        if opened is None or opened[0] != key:
            opened = self._reopen(key)
        write_whole(opened[2], (line + "\n").encode("utf-8", "backslashreplace"))

    def _reopen(self, key: tuple[int, int]) -> tuple[tuple[int, int], str, int]:
        path, before = self.path(key[0]), self._open
        if before is not None and before[1] == path:
            self._open = (key, path, before[2])
            return self._open
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._open = (key, path, descriptor)
        if before is not None:
            os.close(before[2])
        return self._open

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        opened, self._open = self._open, None
        if opened is not None:
            os.close(opened[2])

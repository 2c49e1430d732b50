"""The processes that write a consolidated checkpoint, each the files that it is given.

[Note: worker] A worker is a Python process of its own that reads a pickled `Job` from its parent's pipe, and answers
through another with the bytes that it has written, and in the end with an error or with None. It is not a process of
`multiprocessing`, which would run the caller's script again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_fragment.checkpoint.writer import Entry, Writer
from ds_fragment.errors import CheckpointError
from ds_fragment.zero_checkpoint.read import Reader
from ds_fragment.zero_checkpoint.sources import Source

_START = "from ds_fragment.zero_checkpoint.workers import work; work()"


@dataclass(frozen=True)
class Part:
    """What goes into one file or its shards."""

    target: Path
    sources: list[Source | float]  # a number is written as an fp32 tensor without dimensions
    entries: list[Entry]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A whole save. Its shards are those of the model and then those of the optimizer."""

    model: Part
    optimizer: Part | None
    max_shard_bytes: int
    token: str

    def writer(self) -> Writer:
        """A writer of the model, with one of the optimizer beside it."""
        beside = None if self.optimizer is None else self._writer(self.optimizer, None)
        return self._writer(self.model, beside)

    def _writer(self, part: Part, beside: Writer | None) -> Writer:
        return Writer(part.target, part.entries, part.metadata, self.max_shard_bytes, token=self.token, beside=beside)

    def write(self, writer: Writer, shards: Iterable[int], report: Callable[[int], None]) -> None:
        """Write these shards; ``report`` is called with the bytes that were written so far."""
        with Reader(reuse=True) as reader:
            for shard in shards:
                of_model = shard < len(writer.shards)
                part, into = (self.model, writer) if of_model else (self.optimizer, writer.beside)
                assert part is not None
                assert into is not None
                for position in into.shards[shard if of_model else shard - len(writer.shards)]:
                    source = part.sources[position]
                    tensor = reader.read(source) if isinstance(source, Source) else torch.tensor(source)
                    into.write(position, tensor)
                    report(writer.written + (writer.beside.written if writer.beside else 0))
        writer.close()


def run(job: Job, writer: Writer, count: int, report: Callable[[int], None]) -> None:
    """Have so many processes write all shards; ``report`` is called with the bytes that were written so far.

    Raises:
        Exception: what a worker raised; CheckpointError where one died.
    """
    try:
        _run(job, _plans(writer, count), report)
    except BaseException:
        for path in job.model.target.parent.glob(f".*.{job.token}.tmp"):  # of processes that were killed
            path.unlink(missing_ok=True)
        raise


def _run(job: Job, plans: list[list[int]], report: Callable[[int], None]) -> None:
    inbox: queue.Queue[tuple[int, Any]] = queue.Queue()
    done, running = [0] * len(plans), len(plans)
    with contextlib.ExitStack() as stack:
        for index, shards in enumerate(plans):
            process = _start(stack)
            threading.Thread(target=_talk, args=(index, process, (job, shards), inbox), daemon=True).start()
        while running:
            index, message = inbox.get()
            if isinstance(message, BaseException):
                raise message
            if message is None:
                running -= 1
            else:
                done[index] = message
                report(sum(done))


def _plans(writer: Writer, count: int) -> list[list[int]]:
    """The shards of each process, so that all have about the same number of bytes."""
    parts = [writer, *([writer.beside] if writer.beside else [])]
    sizes = [sum(part.entries[position].nbytes for position in span) for part in parts for span in part.shards]
    plans: list[list[int]] = [[] for _ in range(count)]
    for shard in sorted(range(len(sizes)), key=lambda shard: -sizes[shard]):
        min(plans, key=lambda plan: sum(sizes[each] for each in plan)).append(shard)
    return plans


def _start(stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", _START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    stack.callback(process.wait)
    stack.callback(process.kill)  # one that has answered to the end is done
    return process


def _talk(index: int, process: subprocess.Popen[bytes], work: object, inbox: queue.Queue[tuple[int, Any]]) -> None:
    """Give a worker its work, and pass on what it says, in a thread of its own."""
    assert process.stdin is not None
    assert process.stdout is not None
    message: Any = 0
    try:
        with process.stdin, process.stdout:
            pickle.dump(work, process.stdin)
            process.stdin.flush()
            while isinstance(message, int):
                message = pickle.load(process.stdout)
                inbox.put((index, message))
    except (OSError, EOFError, pickle.UnpicklingError):
        died = CheckpointError(f"process {index} of those that write died (exit code {process.wait()})")
        inbox.put((index, died))


def work() -> None:
    """The worker: see [Note: worker]."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(1)
    job, shards = pickle.load(sys.stdin.buffer)
    writer = job.writer()

    def answer(message: object) -> None:
        pickle.dump(message, answers)
        answers.flush()

    try:
        job.write(writer, sorted(shards), answer)
        answer(None)
    except Exception as error:
        writer.abandon()
        answer(error)

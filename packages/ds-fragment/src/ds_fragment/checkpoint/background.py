"""The thread that writes a save's tensors while the ranks gather the next ones, or while training goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ds_fragment.checkpoint import files
from ds_fragment.checkpoint.writer import Writer
from ds_fragment.collective.agree import agree, everyone
from ds_fragment.errors import FragmentError

_QUEUE_BYTES = 1 << 28  # that a save which is waited for keeps on the host
_POLL = 0.05  # seconds between two looks into the store
_PATIENCE = 1800.0  # seconds that ranks which write wait for each other once they are done themselves

_log = logging.getLogger("ds.fragment")


@dataclass
class _Item:
    """One tensor on the host, of the entry's dtype; it is there once the event has come."""

    writer: Writer
    position: int
    tensor: torch.Tensor
    event: Any


class BackgroundSave:
    """A save whose files are being written; ``save_full(..., background=True)`` returns it.

    At most one is under way: the next `save_full` or `load_full` waits for it, and raises its error. A program that
    comes to its end does not exit before the files are written.
    """

    def __init__(
        self, writer: Writer | None, leaders: Sequence[int], token: str, progress: files.Progress, *, background: bool
    ) -> None:
        self._writer, self._leaders, self._token, self._progress = writer, leaders, token, progress
        self._background = background
        self._queue: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._queued = 0  # bytes
        self._ended = self._waited = False
        self._error: BaseException | None = None
        self._told: FragmentError | None = None  # what `wait` raised
        self._thread: threading.Thread | None = None
        if writer is not None:
            self._thread = threading.Thread(target=self._run, name="ds-fragment save")
            self._thread.start()

    def put(self, writer: Writer, position: int, tensor: torch.Tensor) -> None:
        """Have a tensor written. In the background a copy is taken; else this waits while the queue is full.

        Raises:
            Exception: what was put earlier could not be written.
        """
        dtype, event = writer.entries[position].dtype, None
        if tensor.is_cuda:
            kept = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
            kept.copy_(tensor.detach().to(dtype), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        else:
            kept = tensor.detach().to("cpu", dtype, copy=self._background)
        with self._changed:
            while not self._background and self._queued > _QUEUE_BYTES and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            self._queue.append(_Item(writer, position, kept, event))
            self._queued += kept.nbytes
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more comes; or that the save has failed, and wait until what was written is gone."""
        with self._changed:
            self._ended = True
            self._error = self._error or error
            self._changed.notify_all()
        if error is not None:
            self._join()

    def done(self) -> bool:
        """Whether this rank has written its part, or failed to. Each rank may call it."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the save is current on the disk. All ranks of the default group must call it.

        Raises:
            FragmentError: a rank could not write; the same on every rank. What was there before is as it was.
        """
        global _earlier
        if _earlier is self:
            _earlier = None
        self._join()
        if self._told is not None:
            raise self._told
        if self._waited:
            return
        self._waited = True
        error = self._error if self._error is None or isinstance(self._error, Exception) else None
        try:
            agree(error, everyone(), torch.device("cpu"))
        except FragmentError as told:
            self._told = told
            raise

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        writer = self._writer
        assert writer is not None
        with contextlib.ExitStack() as stack:
            stack.callback(writer.abandon)
            try:
                report = stack.enter_context(files.reporter(self._progress, writer.target.name))
                total = writer.total + (0 if writer.beside is None else writer.beside.total)
                done = 0
                while (item := self._next()) is not None:
                    if item.event is not None:
                        item.event.synchronize()
                    item.writer.write(item.position, item.tensor)
                    done += item.tensor.nbytes
                    del item
                    report(done, total)
                if self._error is None:
                    writer.close()
                    self._commit(writer)
            except BaseException as error:
                self._fail(error)

    def _next(self) -> _Item | None:
        """What is to be written next; None where the save has ended or failed."""
        with self._changed:
            while not self._queue and not self._ended and self._error is None:
                self._changed.wait()
            if not self._queue or self._error is not None:
                return None
            item = self._queue.popleft()
            self._queued -= item.tensor.nbytes
            self._changed.notify_all()
            return item

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._queue.clear()
            self._changed.notify_all()
        assert self._writer is not None
        if self._background:  # somebody may never ask
            _log.error("%s is not saved: %s: %s", self._writer.target, type(error).__name__, error)
        if len(self._leaders) > 1:
            self._tell("failed")

    def _commit(self, writer: Writer) -> None:
        """The first of the ranks that write makes the save current, once the others have told it that they are done."""
        first, *others = self._leaders
        if not others:
            writer.commit()
        elif dist.get_rank() == first:
            for rank in others:
                self._hear(rank)
            writer.commit()
            self._tell("done")
        else:
            self._tell("done")
            self._hear(first)

    def _tell(self, how: str) -> None:
        distributed_c10d._get_default_store().set(self._key(dist.get_rank()), how)

    def _hear(self, rank: int) -> None:
        """Wait until another rank says that it is done; a look at the store now and then blocks nobody else's."""
        store, begin = distributed_c10d._get_default_store(), time.monotonic()
        while not store.check([self._key(rank)]):
            if time.monotonic() - begin > _PATIENCE:
                raise FragmentError(f"rank {rank} has not written its part after {_PATIENCE:.0f} seconds")
            time.sleep(_POLL)
        if store.get(self._key(rank)) != b"done":
            raise FragmentError(f"rank {rank} could not write its part, and its own error says why")

    def _key(self, rank: int) -> str:
        return f"ds_fragment/save/{self._token}/{rank}"


_earlier: BackgroundSave | None = None


def begin(save: BackgroundSave) -> None:
    """Note the save that is under way."""
    global _earlier
    _earlier = save


def finish_earlier() -> None:
    """Wait for the save that is under way, if any; all ranks must call it.

    Raises:
        FragmentError: it failed; the same on every rank.
    """
    if _earlier is not None:
        try:
            _earlier.wait()
        except FragmentError as error:
            raise type(error)(f"an earlier save_full(background=True) failed: {error}") from error

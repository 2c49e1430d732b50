"""The context manager, and the thread that notices that nothing happens any more."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ds_z3leaf._flags import outermost_leaves
from ds_z3leaf._rehearse.calls import hidden_by
from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._rehearse.ranks import Ranks
from ds_z3leaf._walk import check_model
from ds_z3leaf._watch.diagnosis import Verdict, diagnose
from ds_z3leaf._watch.history import History, Report
from ds_z3leaf._watch.mailbox import Mailbox
from ds_z3leaf._watch.recorder import Recorder
from ds_z3leaf.errors import LeafHangError, LeafTypeError, LeafValueError

logger = logging.getLogger("ds.z3leaf")

OnHang = Literal["raise", "exit", "log"]
_POLL, _GRACE = 0.5, 10.0  # seconds: between two looks at the store; for ranks to answer, or to end after a hang
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out|process ?group|abort", re.I)


class watch:
    """Say why ranks wait for each other: where they part, and which leaf would have helped.

    Records which modules this rank enters and leaves. If it has entered and left none for `timeout` seconds, or another
    rank has not, every rank tells what it called last, through the store that the ranks met in. If they called
    different modules, every rank logs where they part and the leaf that would have helped, at ERROR. The same is done
    when a collective fails inside the block. It costs two Python hooks a module call, a thread, and no collective.

    Only ranks that stop are noticed: where collectives of different modules happen to fit each other, ranks go on with
    wrong values. Rehearse the model to find that out. Ranks are expected to call the same modules: where one rank alone
    evaluates the model and the others wait longer than `timeout`, they are said to have parted. Calls inside a module
    that was compiled before, and has run, are not seen.

    Args:
        model: a model, or a DeepSpeed engine or DDP module around one; with its leaves and its engine in place.
        timeout: seconds without a call after which ranks compare; longer than the longest pause between two calls of
            modules, but shorter than the time-out of the collectives.
        group: the ranks to compare; None stands for all.
        on_hang: what to do when ranks have parted. "raise": abort the process groups, which ends a collective of NCCL
            at once, while one of gloo ends at its own time-out; then leave the block by `LeafHangError`. "exit": the
            same, and end the process with status 1 if the block is not left within 10 seconds. "log": only log.

    Every rank of `group` must enter and leave it, equally often. It does nothing without a process group, on a rank
    that is alone in it, and on a rank that is not in it.

    Raises:
        LeafTypeError: `model` is no module.
        LeafValueError: `timeout` is not above 0, or `on_hang` is none of the three.
        LeafHangError: leaving the block, if ranks have parted and `on_hang` is not "log"; its cause is the exception
            of the collective, if there was one. Exceptions of other kinds pass unchanged.

    >>> with watch(nn.Linear(1, 1), timeout=60.0):
    ...     pass
    """

    def __init__(
        self, model: nn.Module, *, timeout: float = 120.0, group: Any = None, on_hang: OnHang = "raise"
    ) -> None:
        check_model(model)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise LeafTypeError(f"timeout is a {type(timeout).__name__}: pass seconds")
        if not timeout > 0:
            raise LeafValueError(f"timeout is {timeout}: pass a number of seconds above 0")
        if on_hang not in ("raise", "exit", "log"):
            raise LeafValueError(f"on_hang is {on_hang!r}: pass 'raise', 'exit' or 'log'")
        self._model, self._timeout, self._group, self._on_hang = model, float(timeout), group, on_hang
        self._thread: _Thread | None = None

    def __enter__(self) -> None:
        """Start to watch. Every rank of the group must call it."""
        if self._group is not None and self._group is dist.GroupMember.NON_GROUP_MEMBER:
            return
        if self._thread is not None:
            raise LeafValueError("this watch() is entered already: make another one for a block inside")
        ranks = Ranks(self._group)
        if ranks.size == 1:
            return
        self._thread = _Thread(_inner(self._model), self._timeout, ranks.numbers, self._on_hang)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to watch."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        collective = isinstance(error, RuntimeError) and (
            isinstance(error, getattr(dist, "DistError", ())) or bool(_COLLECTIVE.search(str(error)))
        )
        verdict = thread.stop(ask=collective, left="" if error is None else f"left by {type(error).__name__}")
        if verdict is not None and self._on_hang != "log" and (error is None or collective):
            raise LeafHangError(verdict.text) from error


def _inner(model: nn.Module) -> nn.Module:
    """The model itself, without an engine around it, so that names are those that leaves are marked by."""
    inner = getattr(model, "module", None)
    around = type(model).__name__ in ("DeepSpeedEngine", "DistributedDataParallel", "PipelineEngine")
    return inner if around and isinstance(inner, nn.Module) else model


def _gathered(model: nn.Module, index: ModuleIndex) -> tuple[list[bool], set[int]]:
    """For which modules the engine gathers, by number, and the numbers of the leaves.

    FSDP2 gathers for its units. DeepSpeed, and whatever else there may be, does for every module outside the leaves.
    """
    if dist.is_available() and "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        units = [isinstance(module, FSDPModule) for module in index.modules]
        if any(units):
            return units, {
                number
                for number, unit in enumerate(units)
                if unit and not any(units[below] for below in index.inside(number) - {number})
            }
    leaves = {index.number[id(leaf)] for leaf in outermost_leaves(model)}
    hidden = hidden_by(leaves, index)
    return [number not in hidden for number in range(len(index.modules))], leaves


class _Thread:
    """Looks whether there was an event; asks the other ranks if there was none, and answers them."""

    def __init__(self, model: nn.Module, timeout: float, ranks: Sequence[int], on_hang: OnHang) -> None:
        self._timeout = timeout
        self._ranks = ranks
        self._rank = dist.get_rank()
        self._on_hang = on_hang
        self._index = ModuleIndex(model)
        self._counted, self._leaves = _gathered(model, self._index)
        self._digest = self._index.digest()
        self._history = History(self._counted, threading.get_ident())
        self._mailbox = Mailbox(ranks, self._rank)
        self._recorder = Recorder(self._index, self._history.write)
        self._wake = threading.Event()
        self._ask_now = False
        self._stopped = False
        self._question = 0
        self._verdict: Verdict | None = None
        self._total, self._since = 0, time.monotonic()
        self._limit = timeout  # doubled after a question that found nothing
        self._thread = threading.Thread(target=self._run, name="ds_z3leaf.watch", daemon=True)

    def start(self) -> None:
        """Record, and look."""
        self._recorder.__enter__()
        self._thread.start()

    def stop(self, ask: bool, left: str) -> Verdict | None:
        """End it; ask once more first if `ask` and nothing was found yet. Returns what parted the ranks, if so."""
        self._recorder.__exit__()
        self._ask_now = ask
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=4 * _GRACE)
        if self._verdict is None and not self._thread.is_alive():
            try:
                self._mailbox.leave(self._report(left or "left the block"))
            except Exception as error:
                logger.debug("watch() cannot tell the other ranks that it ends: %s", error)
        return self._verdict

    def _run(self) -> None:
        try:
            while self._verdict is None and (self._ask_now or not self._stopped):
                self._wake.wait(min(_POLL, self._timeout / 4))
                if self._overdue() or (not self._stopped and self._mailbox.asked(self._question)):
                    self._ask()
            if self._verdict is not None:
                self._act(self._verdict)
        except Exception as error:  # the store is gone
            logger.warning("watch() ends: the store cannot be reached (%s)", error)

    def _overdue(self) -> bool:
        now = time.monotonic()
        if self._history.total != self._total:
            self._total, self._since, self._limit = self._history.total, now, self._timeout
        return self._ask_now or (not self._stopped and now - self._since >= self._limit)

    def _report(self, left: str | None = None) -> Report:
        return self._history.report(self._digest, time.monotonic() - self._since, left)

    def _ask(self) -> None:
        self._ask_now = False
        question, self._question = self._question, self._question + 1
        self._mailbox.put(question, self._report())
        self._mailbox.ask(question)
        verdict = self._await(question)
        self._since, self._limit = time.monotonic(), 2 * self._limit
        if verdict.parted:
            self._verdict = verdict
            logger.error("%s", verdict.text)
        elif self._rank == self._ranks[0]:
            logger.warning("%s", verdict.text)

    def _await(self, question: int) -> Verdict:
        """The verdict of the first rank that is there; after the time of grace, one of this rank's own."""
        grace = min(_GRACE, max(self._timeout, 4 * _POLL))
        start = time.monotonic()
        reports: dict[int, Report] = {}
        while (verdict := self._mailbox.verdict(question)) is None:
            waited = time.monotonic() - start
            if waited > 2 * grace or self._mailbox.first() == self._rank:
                reports = self._mailbox.collect(question, reports)
                if len(reports) == len(self._ranks) or waited > grace:
                    verdict = diagnose(reports, self._ranks, self._index, self._counted, self._leaves)
                    self._mailbox.decide(question, verdict)
                    return verdict
            time.sleep(0.05)
        return verdict

    def _act(self, verdict: Verdict) -> None:
        if self._on_hang == "log":
            return
        _abort_groups()
        deadline = time.monotonic() + _GRACE
        while self._on_hang == "exit" and not self._stopped:
            if time.monotonic() > deadline:
                for handler in [*logging.getLogger().handlers, *logger.handlers]:
                    handler.flush()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
            self._wake.wait(0.1)


def _abort_groups() -> None:
    """End what collectives of NCCL wait for. Gloo has nothing like it."""
    nccl: list[Any] = []
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            nccl.append(group._get_backend(torch.device("cuda")))
        except RuntimeError:  # no backend for this device
            continue
    nccl = [backend for backend in nccl if type(backend).__name__ == "ProcessGroupNCCL"]
    if not nccl:
        return
    try:
        # One call for all of them: an abort of one communicator can wait for a rank that aborts another.
        nccl[0]._group_start()
        for backend in nccl:
            backend.abort()
        nccl[0]._group_end()
    except Exception as error:
        logger.warning("watch() cannot abort the process groups, which will end at their own time-outs: %s", error)

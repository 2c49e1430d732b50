"""A log of communication operations. The names of ``deepspeed.utils.comms_logging``."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ds_logging import _timeline
from ds_logging._caller import get_caller_func
from ds_logging._comms.bandwidth import (
    calc_bw_log,
    canonical_name,
    check_group_size,
    check_latency,
    check_size,
    convert_size,
    rule_of,
)
from ds_logging._comms.comms_dict import CommsDict
from ds_logging._comms.config import operation_names, read_options
from ds_logging._comms.exchange import decode, encode, gather_bytes
from ds_logging._comms.jsonl import to_jsonl
from ds_logging._comms.op_stats import OpKey, OpStats, by_record, merge as merge_stats, pack, summarize_all, unpack
from ds_logging._comms.op_table import OpTable
from ds_logging._comms.operation import Operation
from ds_logging._comms.operations_json import read_operations, write_operations
from ds_logging._comms.perfetto import Timeline, to_perfetto
from ds_logging._comms.plot import plot_bandwidth
from ds_logging._comms.recorder import recorder
from ds_logging._comms.straggler_report import GroupReport, Wait, straggler_report
from ds_logging._comms.table import straggler_table, summary_table
from ds_logging._hang.watch import HangWatch
from ds_logging._nvtx import ranged
from ds_logging._rank import current_position
from ds_logging._step import begun_steps
from ds_logging._straggler import analyze, exchange
from ds_logging._timers.device_timer import DeviceTimer, choose_device
from ds_logging.errors import ArgumentError
from ds_logging.logging import log_dist, warning_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CommsLogger",
    "GroupReport",
    "Wait",
    "calc_bw_log",
    "convert_size",
    "get_caller_func",
    "print_rank_0",
]

_NO_TORCH = "there is no torch.distributed in this process: only what append and timed are told counts"
_FOLD_AFTER = 256  # operations that wait to be counted


def print_rank_0(message: object) -> None:
    """Print a message to standard output, as it is, on rank 0."""
    if current_position().rank == 0:
        print(message, file=sys.stdout, flush=True)


class CommsLogger:
    """Records every collective and point-to-point operation of this process, whoever issued it.

    It records between `start` and `stop`, in a ``with`` block, or while ``enabled`` is true: what torch.distributed's
    functions, FSDP2, DDP, DeepSpeed, compiled code or anything else give to a process group, synchronous or not. Sizes,
    dtypes and groups are the operations' own. The host never waits for a device. Memory is bounded.

    Latency is the device's own time where the backend measures it (NCCL), else the host's time from the call to the end
    of waiting. Where nobody saw an operation end, it is counted without a latency. What torch cannot show is named by
    `summary` under ``"not_seen"``.

    ``prof_all``, ``prof_ops``, ``verbose`` and ``debug`` may be assigned at any time. Threads may share it.

    Args:
        window: how many latencies are kept for each kind of operation, see [Note: window] in ``_comms.op_stats``.
        max_sizes: how many different message sizes of a record are told apart; further ones are rounded up to a power
            of two (their bytes are still counted exactly).
        max_names: how many record names are told apart; further ones are counted under ``"(other)"``.
        history: how many of the last operations are kept one by one, for `to_jsonl`, `to_perfetto` and `stragglers`.
        timing: ask the backend to measure operations on the device where it offers that (NCCL: two events each).
        hang_after: seconds after which an operation that is not over counts as a hang: then one rank logs what
            `explain` says, at ERROR. ``None``: only where a wait times out.
        hang_signal: a signal at which this process writes what `explain` says to standard error, also while its main
            thread is stuck in a collective; a handler that the program has for it runs as ever. ``None``: none.

    >>> comms = CommsLogger()
    >>> comms.append("all_reduce", "all_reduce", latency=2.0, msg_size=1_000_000, group_size=4)
    >>> comms.get_operation_summary("all_reduce")[1_000_000]["busbw_avg_gbps"]
    6.0
    """

    def __init__(
        self,
        *,
        window: int = 256,
        max_sizes: int = 1024,
        max_names: int = 1024,
        history: int = 10_000,
        timing: bool = True,
        hang_after: float | None = None,
        hang_signal: int | None = getattr(signal, "SIGUSR1", None),
    ) -> None:
        counts = {"window": window, "max_sizes": max_sizes, "max_names": max_names, "history": history}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{name}={value!r}: give an integer, 1 or more")
        if hang_after is not None and not 0 < hang_after < math.inf:
            raise ArgumentError(f"hang_after={hang_after!r}: give seconds, more than 0, or None")
        self.prof_all = True
        self.prof_ops: list[str] = []
        self.verbose = False
        self.debug = False
        self._timing = timing
        self._recording = False
        self._attached = False  # to torch; False also while it records, in a process without torch
        self._began_ns = 0
        self._not_seen: dict[str, None] = {}  # of recordings that have ended
        self._seen: deque[tuple[OpKey, float | None]] = deque()  # not counted yet; appending needs no lock
        self._history: deque[Operation] = deque(maxlen=history)
        self._table = OpTable(window=window, max_sizes=max_sizes, max_names=max_names)
        self._timer = DeviceTimer()
        self._lock = threading.RLock()
        self._folding = False
        self._watch = HangWatch(hang_after=hang_after, hang_signal=hang_signal)
        _logs.add(self)

    # ---- recording

    def start(self) -> None:
        """Record from now on. No communication; the ranks need not agree. Starting twice is starting once.

        It works before ``init_process_group`` and for groups that are made later. Without torch there is nothing to
        record: `append` and `timed` count all the same.
        """
        if not self._recording:
            self._recording = True
            self._began_ns = time.time_ns()
            self._attached = recorder.add(self._note, timing=self._timing)
            if self._attached:
                _timeline.begin()
                self._watch.start()
            else:
                self._not_seen[_NO_TORCH] = None

    def stop(self) -> None:
        """Record no more; what was recorded stays. The last log that stops puts torch back as it was."""
        if self._recording:
            if self._attached:
                self._watch.stop()
                self._not_seen.update(dict.fromkeys(recorder.remove(self._note)))
                _timeline.end()
            self._recording = self._attached = False

    def __enter__(self) -> CommsLogger:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def enabled(self) -> bool:
        """Whether it records. Assigning is `start` or `stop`."""
        return self._recording

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value:
            self.start()
        else:
            self.stop()

    def configure(self, comms_config: object) -> None:
        """Take settings from DeepSpeed's configuration object or a mapping. What is not mentioned stays.

        Args:
            comms_config: DeepSpeed's object (attributes ``comms_logger_enabled`` and ``comms_logger``), a mapping with
                some of enabled, prof_all, prof_ops, verbose, debug, or a mapping with such a one as "comms_logger".

        Raises:
            ArgumentError: an unknown setting, or one of the wrong type. Nothing is changed then.
        """
        for name, value in read_options(comms_config).items():
            setattr(self, name, value)

    def start_profiling_comms(self) -> None:
        """Select every operation."""
        self.prof_all = True

    def stop_profiling_comms(self) -> None:
        """Select only the operations in ``prof_ops``."""
        self.prof_all = False

    def start_profiling_op(self, op_name_list: Iterable[str]) -> None:
        """Select these operations also while ``prof_all`` is off."""
        self.prof_ops = list(dict.fromkeys([*self.prof_ops, *operation_names(op_name_list, "op_name_list")]))

    def stop_profiling_op(self, op_name_list: Iterable[str]) -> None:
        """Take these operations out of ``prof_ops``."""
        dropped = operation_names(op_name_list, "op_name_list")
        self.prof_ops = [name for name in self.prof_ops if name not in dropped]

    def _after_fork(self) -> None:
        """Record nothing in a forked child: it has neither the threads nor the process groups of its parent."""
        self._lock = threading.RLock()  # a thread that the child does not have may hold the old one
        self._folding = False
        self._watch.after_fork()
        if self._attached:
            _timeline.end()
        self._recording = self._attached = False

    def _note(self, operation: Operation) -> None:
        if not (self.prof_all or operation.name in self.prof_ops or operation.kind in self.prof_ops):
            return
        self._history.append(operation)
        size = check_group_size(operation.group_size)
        key = OpKey(
            operation.name, operation.kind, operation.nbytes, size, operation.group, operation.ranks, operation.dtype
        )
        self._count(key, operation.latency_ms)

    def _count(self, key: OpKey, latency: float | None) -> None:
        self._seen.append((key, latency))
        if len(self._seen) > _FOLD_AFTER:
            self._fold()
        if self.verbose:
            one = OpStats(key, deque())
            one.add(latency, key.msg_size)
            time, rates = "time unknown", ""
            if latency is not None:
                algorithm, bus = one.bandwidth(latency)
                time, rates = f"{latency:.2f} ms", f", algbw {algorithm:.2f} Gbps, busbw {bus:.2f} Gbps"
            size = convert_size(key.msg_size)
            log_dist(f"{key.record_name}: {time}, {size}, {key.group_size} ranks{rates}", ranks=[0])

    def _fold(self) -> None:
        with self._lock:
            if self._folding:  # a signal handler interrupted us in this thread
                return
            self._folding = True
            try:
                for _ in range(len(self._seen)):
                    self._table.add(*self._seen.popleft())
            finally:
                self._folding = False

    def _snapshot(self) -> list[OpStats]:
        self._timer.flush()
        recorder.settle()
        self._fold()
        with self._lock:
            return self._table.snapshot()

    # ---- operations that the caller measures or names

    def append(
        self, raw_name: str, record_name: str, latency: float, msg_size: int, *, group_size: int | None = None
    ) -> None:
        """Count one operation that the caller measured, whether the log is enabled or not.

        While the log records it has seen the operation itself: then ``record_name`` becomes the name of the last
        operation of this kind that this thread issued, and its own latency counts, or this one where it has none.

        Args:
            raw_name: the operation, which chooses the formula. One without a formula is counted all the same: its bus
                bandwidth is NaN, and one warning names it.
            record_name: the name to count it under.
            latency: milliseconds that this operation alone took, not a running total.
            msg_size: bytes of the tensor that this rank passed in.
            group_size: number of ranks that took part; the world size unless given.

        Raises:
            ArgumentError: a number is out of range.
        """
        size, latency, n = check_size(msg_size, "msg_size"), check_latency(latency), check_group_size(group_size)
        if rule_of(raw_name) is None:
            warning_once("no bandwidth formula for the operation %r: its bus bandwidth is not computed", raw_name)
        if not (self._recording and recorder.claim(canonical_name(raw_name), record_name, latency)):
            self._count(OpKey(record_name, raw_name, size, n), latency)

    def timed(
        self,
        raw_name: str,
        msg_size: int | Any,
        *,
        record_name: str | None = None,
        group_size: int | None = None,
        group: Any = None,
        device: str | None = None,
    ) -> AbstractContextManager[None]:
        """Name the operations in a ``with`` block, if the log is enabled and selects them.

        What torch.distributed issues in the block is recorded as ever, with its own size, group and time, also where it
        is asynchronous; ``record_name`` is its name. Of a block without such an operation the block itself is timed: on
        CUDA by two events on the current stream, which the host does not wait for. A block that raises is counted
        without a latency. A block that is captured into a CUDA graph, or compiled by torch.compile, is not counted.

        Args:
            raw_name: the operation.
            msg_size: bytes of the tensor that this rank passes in, or the tensor.
            record_name: the name to count it under, ``raw_name`` unless given. With ``debug`` the calling function's
                name is added.
            group_size: number of ranks that take part; the world size unless given.
            group: the process group, instead of ``group_size``.
            device: "cuda" or "cpu"; unless given, "cuda" if this process uses CUDA. Say "cpu" for gloo beside CUDA.

        Raises:
            ArgumentError: a number is out of range, ``device`` cannot be used, or both ``group`` and ``group_size`` are
                given.
        """
        name = raw_name if record_name is None else record_name
        if not self._recording or ranged.is_compiling():
            return nullcontext()
        if not (self.prof_all or name in self.prof_ops or raw_name in self.prof_ops):
            return nullcontext()
        if group is not None and group_size is not None:
            raise ArgumentError(f"group={group!r} and group_size={group_size!r}: give one of them")
        size = check_size(getattr(msg_size, "nbytes", msg_size), "msg_size")
        n = check_group_size(group.size() if group is not None else group_size)
        if self.debug:
            name = f"{name} | [Caller Func: {get_caller_func(2)}]"
        return _Timed(self, OpKey(name, raw_name, size, n), choose_device(device))

    def explain(self, timeout: float | None = None) -> str:
        """Say who waits for whom: which ranks entered which operation of which group, and which did not.

        Any rank may call it alone, from any thread, while others are stuck. Ranks that record answer from a thread,
        through the store; one that does not answer is named, too.

        Args:
            timeout: seconds to wait for the answers, 3 unless given.
        """
        return self._watch.explain(timeout)

    # ---- results

    def get_raw_data(self) -> dict[str, dict[int, list[Any]]]:
        """Return {record name: {message size: [count, latencies, algorithm bandwidths, bus bandwidths]}}.

        The lists hold the last operations only, as many as ``window`` for each kind, and those only whose latency is
        known; the count is of all.
        """
        raw: dict[str, dict[int, list[Any]]] = {}
        for name, sizes in by_record(self._snapshot()).items():
            raw[name] = {}
            for size, group in sizes.items():
                latencies = [latency for stats in group for latency in stats.known()]
                rates = [stats.bandwidth(latency) for stats in group for latency in stats.known()]
                count = sum(stats.count for stats in group)
                raw[name][size] = [count, latencies, [rate[0] for rate in rates], [rate[1] for rate in rates]]
        return raw

    @property
    def comms_dict(self) -> CommsDict:
        """What `get_raw_data` returns, to be read. ``clear()`` on it, or assigning ``{}``, is `reset_data`.

        Raises:
            ReadOnlyError: any other change of it.
            ArgumentError: anything but an empty mapping is assigned.

        >>> comms = CommsLogger()
        >>> comms.append("broadcast", "weights", latency=1.0, msg_size=1_000_000, group_size=2)
        >>> comms.comms_dict
        {'weights': {1000000: [1, [1.0], [8.0], [8.0]]}}
        >>> comms.comms_dict = {}
        >>> comms.has_data()
        False
        """
        return CommsDict(self.get_raw_data(), self.reset_data)

    @comms_dict.setter
    def comms_dict(self, value: Mapping[str, Any]) -> None:
        if not isinstance(value, Mapping) or value:
            raise ArgumentError(f"comms_dict={value!r}: only {{}} can be assigned, to forget everything; use append()")
        self.reset_data()

    def has_data(self) -> bool:
        """Say whether any operation was counted."""
        return bool(self._snapshot())

    def reset_data(self) -> None:
        """Forget every operation; the settings stay."""
        self._timer.clear()
        recorder.collect()
        with self._lock:
            self._seen.clear()
            self._not_seen.clear()
            self._history.clear()
            self._table.clear()

    def get_operation_names(self) -> list[str]:
        """Return the record names in the order of their first operation."""
        return list(by_record(self._snapshot()))

    def get_total_operations(self) -> int:
        """Return how many operations were counted."""
        return sum(stats.count for stats in self._snapshot())

    def get_operation_summary(self, operation_name: str) -> dict[int, dict[str, Any]] | None:
        """Return {message size: statistics} of one record name, or ``None`` if it was never counted.

        The statistics are those of `log_all`.
        """
        return summarize_all(self._snapshot()).get(operation_name)

    def summary(self, *, merge: bool = True, show: bool = True) -> dict[str, Any]:
        """Return what was counted, of all ranks together, and log a table of at most one screen on rank 0.

        Args:
            merge: join the ranks. **All ranks of the default group must call it then**; it makes one exchange. Without
                it, or without a process group, this rank stands alone, and any rank may call.
            show: log the table, at INFO.

        Returns:
            ``{"world_size", "operations", "records", "not_seen"}``. ``records`` is {record name: {message size:
            statistics}} as in `log_all`; its counts are of all ranks, so a collective of n ranks counts n times.
            ``not_seen`` names what torch could not show to some rank, a sentence each.
        """
        snapshot = self._snapshot()
        not_seen = {**self._not_seen, **dict.fromkeys(recorder.not_seen() if self._attached else ())}
        everyone: list[Any] = [[pack(snapshot), list(not_seen)]]
        if merge:
            everyone = self._exchange(everyone[0])
        stats = merge_stats(unpack(each) for each, _ in everyone)
        records = summarize_all(stats)
        unseen = list(dict.fromkeys(text for _, texts in everyone for text in texts))
        if show:
            rest = "".join(f"\nnot seen: {text}" for text in unseen)
            log_dist(f"communication of {len(everyone)} ranks\n{summary_table(records)}{rest}", stacklevel=2)
        return {
            "world_size": len(everyone),
            "operations": sum(one.count for one in stats),
            "records": records,
            "not_seen": unseen,
        }

    def stragglers(self, *, last: int = 1000) -> list[GroupReport]:
        """Return who waited how long for whom, a report for each process group, that with most waiting first.

        Operations are compared by (group, sequence). Waits are differences of durations, so the ranks' clocks need not
        agree. **All ranks of the default group must call it**; it makes one exchange.

        Args:
            last: how many of its last operations each rank sends to all others.

        Raises:
            ArgumentError: ``last`` is no such number.
        """
        if not isinstance(last, int) or last < 1:
            raise ArgumentError(f"last={last!r}: give an integer, 1 or more")
        self._snapshot()
        everyone = self._exchange(write_operations(list(self._history)[-last:]))
        return straggler_report({rank: read_operations(given) for rank, given in enumerate(everyone)})

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write a line for every kind of operation and one for each of the last operations of this rank.

        No communication. The file appears whole or not at all.

        Args:
            path: the file; ``{rank}`` in it becomes this rank. Ranks that write one path overwrite each other.
        """
        snapshot = self._snapshot()
        path = os.fspath(path).replace("{rank}", str(current_position().rank))
        to_jsonl(path, list(self._history), snapshot)

    def to_perfetto(self, path: str | os.PathLike[str], *, merge: bool = True) -> None:
        """Write the last operations, NVTX ranges, log records and steps as a trace that ui.perfetto.dev opens.

        Ranges are those of functions that `instrument_w_nvtx` decorated while a log recorded, or while a tool is
        attached, and of its blocks; records are those of the logger "ds" and of all below it.

        Args:
            path: the file; ``{rank}`` in it becomes this rank.
            merge: write one file of all ranks, on rank 0, which gathers them. **All ranks of the default group must
                call it then.** Without it each rank writes its own, so ``path`` needs ``{rank}``.
        """
        self._snapshot()
        began, rank = self._began_ns, current_position().rank
        own = Timeline(
            rank,
            list(self._history),
            [one for one in list(_timeline.ranges) if one.start_ns >= began],
            [one for one in list(_timeline.records) if one.time_ns >= began],
            [one for one in begun_steps() if one.time_ns >= began],
        )
        timelines = [Timeline.from_json(one) for one in self._exchange(own.to_json(), dst=0)] if merge else [own]
        if rank == 0 or not merge:
            to_perfetto(os.fspath(path).replace("{rank}", str(rank)), timelines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw this rank's bus bandwidth by message size, a line for each operation of each group. No communication.

        Args:
            path: where to save the picture; ``{rank}`` in it becomes this rank. ``None`` saves nothing.

        Returns:
            A matplotlib figure.

        Raises:
            MissingExtraError: matplotlib is not installed (``pip install ds-logging[plot]``).
        """
        if path is not None:
            path = os.fspath(path).replace("{rank}", str(current_position().rank))
        return plot_bandwidth(self._snapshot(), path)

    def _exchange(self, own: object, *, dst: int | None = None) -> list[Any]:
        with recorder.span(hidden=True):  # the exchange is none of the program's operations
            return [decode(given) for given in gather_bytes(encode(own), dst=dst)]

    def log_all(
        self, print_log: bool = True, show_straggler: bool = False, return_dict: bool = False
    ) -> dict[str, Any] | None:
        """Log a table of all operations, return it as a dict, or both.

        Averages are over the window without its lowest and highest tenth; totals, minima and maxima over everything.
        Bandwidths are in Gbit/s; where several group sizes share a message size they are of all bytes over all time,
        and ``by_group_size`` has each.

        Args:
            print_log: log the tables at INFO, on rank 0 or on the ranks that `configure` names. It is the own rank's
                table; `summary` has all ranks in one.
            show_straggler: compare with the other ranks. **All ranks of the default group must call it then**; their
                operations may differ. Without a process group this rank is compared with itself.
            return_dict: return ``{"summary", "straggler_analysis", "metadata"}``.

        Returns:
            The dict, or ``None`` without ``return_dict``. ``straggler_analysis`` is ``None`` without
            ``show_straggler``; its times are of the operations that all ranks still have in their windows.
        """
        snapshot = self._snapshot()
        summary = summarize_all(snapshot)
        analysis = None
        if show_straggler:
            with recorder.span(hidden=True):  # the exchange is none of the program's operations
                analysis = analyze(*exchange(snapshot))
        if print_log:
            table = summary_table(summary)
            if analysis is not None:
                table += f"\nTime that this rank waited for others\n{straggler_table(analysis)}"
            log_dist(f"communication\n{table}", stacklevel=2)
        if not return_dict:
            return None
        position = current_position()
        return {
            "summary": summary,
            "straggler_analysis": analysis,
            "metadata": {
                "world_size": position.world_size or 1,
                "rank": position.rank,
                "timestamp": datetime.now().astimezone().isoformat(),
            },
        }


class _Timed:
    """The block of `CommsLogger.timed`."""

    def __init__(self, log: CommsLogger, key: OpKey, device: str) -> None:
        self._log = log
        self._key = key
        self._device = device
        self._span = recorder.span(key.record_name)

    def __enter__(self) -> None:
        self._noted = self._span.__enter__()
        if self._device == "cuda":
            cuda: Any = sys.modules["torch"].cuda
            self._captured = cuda.is_current_stream_capturing()
            if not self._captured:
                self._start, self._end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                self._start.record()
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        took = (time.perf_counter() - self._began) * 1e3
        self._span.__exit__(None, None, None)
        log, key = self._log, self._key
        if self._noted.count:  # the recorder saw what was issued
            return
        if error is not None:
            log._count(key, None)
        elif self._device == "cpu":
            log._count(key, took)
        elif not self._captured:
            self._end.record()
            log._timer.add(self._start, self._end, lambda milliseconds: log._count(key, milliseconds))


def _after_fork() -> None:
    recorder.after_fork()
    for log in list(_logs):
        log._after_fork()


def _stop_all() -> None:
    """End the threads before the interpreter does: one inside C++ would abort the process then."""
    for log in list(_logs):
        with contextlib.suppress(Exception):
            log.stop()


_logs: weakref.WeakSet[CommsLogger] = weakref.WeakSet()
atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""A log of communication operations. The names of ``deepspeed.utils.comms_logging``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

from ds_logging._bandwidth import (
    bandwidth,
    calc_bw_log,
    check_group_size,
    check_latency,
    check_size,
    convert_size,
    rule_of,
)
from ds_logging._caller import get_caller_func
from ds_logging._comms_config import operation_names, read_options
from ds_logging._comms_dict import CommsDict
from ds_logging._comms_table import straggler_table, summary_table
from ds_logging._device_timer import DeviceTimer, choose_device
from ds_logging._op_stats import OpKey, OpStats, by_record, summarize_all
from ds_logging._op_table import OpTable
from ds_logging._rank import current_position
from ds_logging._straggler import analyze, exchange
from ds_logging.errors import ArgumentError
from ds_logging.logging import log_dist, warning_once

__all__ = ["CommsLogger", "calc_bw_log", "convert_size", "get_caller_func", "print_rank_0"]


def print_rank_0(message: object) -> None:
    """Print a message to standard output, as it is, on rank 0."""
    if current_position().rank == 0:
        print(message, file=sys.stdout, flush=True)


class CommsLogger:
    """Counts communication operations by name, message size and group size. Threads may share it.

    The attributes ``enabled``, ``prof_all``, ``prof_ops``, ``verbose`` and ``debug`` may be assigned at any time.

    Args:
        window: how many latencies are kept for each kind of operation, see [Note: window] in ``_op_stats``.
        max_sizes: how many different message sizes of a record are told apart; further ones are rounded up to a power
            of two (their bytes are still counted exactly).
        max_names: how many record names are told apart; further ones are counted as "(other)", and one warning says so.

    >>> comms = CommsLogger()
    >>> comms.append("all_reduce", "all_reduce", latency=2.0, msg_size=1_000_000, group_size=4)
    >>> comms.get_operation_summary("all_reduce")[1_000_000]["busbw_avg_gbps"]
    6.0
    """

    def __init__(self, *, window: int = 256, max_sizes: int = 1024, max_names: int = 1024) -> None:
        for name, value in (("window", window), ("max_sizes", max_sizes), ("max_names", max_names)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r}: give an integer, 1 or more")
        self.enabled = False
        self.prof_all = True
        self.prof_ops: list[str] = []
        self.verbose = False
        self.debug = False
        self._table = OpTable(window=window, max_sizes=max_sizes, max_names=max_names)
        self._timer = DeviceTimer()

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

    def append(
        self, raw_name: str, record_name: str, latency: float, msg_size: int, *, group_size: int | None = None
    ) -> None:
        """Count one operation, whether the log is enabled or not.

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
        self._table.add(OpKey(record_name, raw_name, size, n), latency)
        if self.verbose:
            algorithm, bus = bandwidth(rule_of(raw_name), size, latency, n)
            log_dist(
                f"{record_name}: {latency:.2f} ms, {convert_size(size)}, {n} ranks, "
                f"algbw {algorithm:.2f} Gbps, busbw {bus:.2f} Gbps",
                ranks=[0],
            )

    @contextmanager
    def timed(
        self,
        raw_name: str,
        msg_size: int,
        *,
        record_name: str | None = None,
        group_size: int | None = None,
        device: str | None = None,
    ) -> Iterator[None]:
        """Time the operation in a ``with`` block and count it, if the log is enabled and selects it.

        The host never waits: on CUDA two events are put on the current stream and read once the device has passed
        them, at the latest when a result is asked for. Wait for an ``async_op=True`` handle inside the block. A block
        that raises, or that is captured into a CUDA graph, is not counted.

        Args:
            raw_name: the operation.
            msg_size: bytes of the tensor that this rank passes in.
            record_name: the name to count it under, ``raw_name`` unless given. With ``debug`` the calling function's
                name is added.
            group_size: number of ranks that take part; the world size unless given.
            device: "cuda" or "cpu"; unless given, "cuda" if this process uses CUDA. Say "cpu" for gloo beside CUDA.

        Raises:
            ArgumentError: a number is out of range, or ``device`` cannot be used.
        """
        name = raw_name if record_name is None else record_name
        if not (self.enabled and (self.prof_all or name in self.prof_ops or raw_name in self.prof_ops)):
            yield
            return
        size, n = check_size(msg_size, "msg_size"), check_group_size(group_size)
        if self.debug:
            name = f"{name} | [Caller Func: {get_caller_func()}]"
        count = partial(self.append, raw_name, name, msg_size=size, group_size=n)
        if choose_device(device) == "cpu":
            started = time.perf_counter()
            yield
            count((time.perf_counter() - started) * 1e3)
            return
        cuda: Any = sys.modules["torch"].cuda
        if cuda.is_current_stream_capturing():
            yield
            return
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._timer.add(start, end, count)

    def _snapshot(self) -> list[OpStats]:
        self._timer.flush()
        return self._table.snapshot()

    def get_raw_data(self) -> dict[str, dict[int, list[Any]]]:
        """Return {record name: {message size: [count, latencies, algorithm bandwidths, bus bandwidths]}}.

        The lists hold the last operations only, as many as ``window`` for each group size; the count is of all.
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

    def log_all(
        self, print_log: bool = True, show_straggler: bool = False, return_dict: bool = False
    ) -> dict[str, Any] | None:
        """Log a table of all operations, return it as a dict, or both.

        Averages are over the window without its lowest and highest tenth; totals, minima and maxima over everything.
        Bandwidths are in Gbit/s; where several group sizes share a message size they are of all bytes over all time,
        and ``by_group_size`` has each.

        Args:
            print_log: log the tables at INFO, on every rank that passes ``True``.
            show_straggler: compare with the other ranks. **All ranks of the default group must call it then**; their
                operations may differ. Without a process group this rank is compared with itself.
            return_dict: return ``{"summary", "straggler_analysis", "metadata"}``.

        Returns:
            The dict, or ``None`` without ``return_dict``. ``straggler_analysis`` is ``None`` without
            ``show_straggler``; its times are of the operations that all ranks still have in their windows.
        """
        snapshot = self._snapshot()
        summary = summarize_all(snapshot)
        analysis = analyze(*exchange(snapshot)) if show_straggler else None
        if print_log:
            table = summary_table(summary)
            if analysis is not None:
                table += f"\nTime that this rank waited for others\n{straggler_table(analysis)}"
            log_dist(f"communication\n{table}", ranks=[-1], stacklevel=2)
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

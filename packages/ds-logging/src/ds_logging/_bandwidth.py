"""Algorithm and bus bandwidth of a communication operation, by nccl-tests' formulas.

[Note: bandwidth] *Algorithm bandwidth* is S / t. *Bus bandwidth* is that times a factor which makes it comparable with
the hardware's peak, whatever the number of ranks n. S is the size of the whole array: for an all-gather what every
rank has in the end, for a reduce-scatter what every rank has at the start. Operations are measured here by the tensor
that a rank passes in, so S is n times that size for the gathering ones and for scatter, and that size for the others.
Source: nccl-tests, doc/PERFORMANCE.md, and its gather.cu and scatter.cu.
"""

from __future__ import annotations

import math
import operator
from typing import Literal, NamedTuple

from ds_logging._rank import current_position
from ds_logging.errors import ArgumentError, UnknownOperationError

Factor = Literal["1", "(n-1)/n", "2(n-1)/n"]


class Rule(NamedTuple):
    """How one kind of operation is counted."""

    sizes: Literal["whole", "share"]  # whether a rank's tensor is the whole array or one of n equal shares
    factor: Factor


_BY_RULE: dict[Rule, tuple[str, ...]] = {
    Rule("whole", "2(n-1)/n"): ("all_reduce", "all_reduce_coalesced", "inference_all_reduce"),
    Rule("share", "(n-1)/n"): (
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_coalesced",
        "all_gather_object",
        "allgather_fn",
        "gather",
        "gather_object",
        "scatter",
        "scatter_object_list",
    ),
    Rule("whole", "(n-1)/n"): (
        "reduce_scatter",
        "reduce_scatter_tensor",
        "reduce_scatter_fn",
        "all_to_all",
        "all_to_all_single",
    ),
    Rule("whole", "1"): (
        "broadcast",
        "broadcast_object_list",
        "reduce",
        "send",
        "recv",
        "isend",
        "irecv",
        "send_object_list",
        "recv_object_list",
        "batch_isend_irecv",
        "barrier",
        "monitored_barrier",
    ),
}
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names}


def calc_bw_log(comm_op: str, size: int, duration: float, *, group_size: int | None = None) -> tuple[float, float]:
    """Return algorithm and bus bandwidth of one operation, in Gbit/s (nccl-tests prints GB/s, an eighth of it).

    Args:
        comm_op: the operation, by its name in torch.distributed or deepspeed.comm.
        size: bytes of the tensor that each rank passes in; all of them together for a list.
        duration: milliseconds. 0 means that nothing was measured and gives (0.0, 0.0).
        group_size: number of ranks n that take part; the world size unless given.

    Raises:
        UnknownOperationError: no formula is known for ``comm_op``.
        ArgumentError: a number is out of range.

    >>> calc_bw_log("all_reduce", 1_000_000, 1.0, group_size=4)
    (8.0, 12.0)
    >>> calc_bw_log("all_gather", 1_000_000, 1.0, group_size=4)
    (32.0, 24.0)
    """
    rule = RULES.get(comm_op)
    if rule is None:
        raise UnknownOperationError(
            f"comm_op={comm_op!r} has no bandwidth formula; known are {', '.join(sorted(RULES))}"
        )
    number, time = check_size(size), check_latency(duration, "duration")
    return bandwidth(rule, number, time, check_group_size(group_size))


def bandwidth(rule: Rule | None, size: float, duration: float, n: int) -> tuple[float, float]:
    """Return both bandwidths in Gbit/s for checked arguments; the bus bandwidth is NaN where there is no rule."""
    if duration == 0:
        return 0.0, 0.0
    whole = size * n if rule is not None and rule.sizes == "share" else size  # bytes
    algorithm = whole * 8 / 1e6 / duration  # bytes per millisecond are 8e-6 Gbit/s
    if rule is None:
        return algorithm, math.nan
    factor = {"1": 1.0, "(n-1)/n": (n - 1) / n, "2(n-1)/n": 2 * (n - 1) / n}[rule.factor]
    return algorithm, algorithm * factor


def check_size(size: int, argument: str = "size") -> int:
    """Return a number of bytes as an int."""
    try:
        number = operator.index(size)
    except TypeError:
        number = -1
    if number < 0:
        raise ArgumentError(f"{argument}={size!r}: give a whole number of bytes, 0 or more")
    return number


def check_latency(milliseconds: float, argument: str = "latency") -> float:
    """Return a time in milliseconds as a float."""
    try:
        number = float(milliseconds)
    except (TypeError, ValueError):
        number = math.nan
    if not (0.0 <= number < math.inf):
        raise ArgumentError(f"{argument}={milliseconds!r}: give finite milliseconds, 0 or more")
    return number


def check_group_size(group_size: int | None) -> int:
    """Return the number of ranks, the world size where it is not given; 1 where nobody knows."""
    if group_size is None:
        return current_position().world_size or 1
    try:
        number = operator.index(group_size)
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(f"group_size={group_size!r}: give the number of ranks in the group, 1 or more")
    return number


def convert_size(size_bytes: float) -> str:
    """Return a number of bytes as people write it, in powers of 1024.

    Raises:
        ArgumentError: it is negative or no number.

    >>> convert_size(0), convert_size(1536), convert_size(3 * 1024**3)
    ('0B', '1.5 KB', '3.0 GB')
    """
    if not isinstance(size_bytes, (int, float)) or not 0 <= size_bytes < math.inf:
        raise ArgumentError(f"size_bytes={size_bytes!r}: give a number of bytes, 0 or more")
    if size_bytes == 0:
        return "0B"
    units = ("B", "KB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
    value, unit = float(size_bytes), 0
    while round(value, 2) >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{round(value, 2)} {units[unit]}"

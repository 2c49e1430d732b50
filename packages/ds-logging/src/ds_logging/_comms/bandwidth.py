"""Algorithm and bus bandwidth of a communication operation, by nccl-tests' formulas.

[Note: bandwidth] *Algorithm bandwidth* is S / t. *Bus bandwidth* is that times a factor which makes it comparable with
the hardware's peak, whatever the number of ranks n. S is the size of the whole array: for an all-gather what every
rank has in the end, for a reduce-scatter what every rank has at the start. Operations are measured here by the tensor
that a rank passes in, so S is n times that size for the gathering ones and for scatter, and that size for the others.
Source: nccl-tests, doc/PERFORMANCE.md, and its gather.cu and scatter.cu.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from typing import Literal, NamedTuple

from ds_logging._rank import current_position
from ds_logging.errors import ArgumentError, UnknownOperationError

Factor = Literal["1", "(n-1)/n", "2(n-1)/n"]


class Rule(NamedTuple):
    """How one kind of operation is counted."""

    sizes: Literal["whole", "share"]  # whether a rank's tensor is the whole array or one of n equal shares
    factor: Factor


_BY_RULE: dict[Rule, tuple[str, ...]] = {
    Rule("whole", "2(n-1)/n"): ("all_reduce",),
    Rule("share", "(n-1)/n"): ("all_gather", "gather", "scatter"),
    Rule("whole", "(n-1)/n"): ("reduce_scatter", "all_to_all"),
    Rule("whole", "1"): ("broadcast", "reduce", "send", "recv", "batch_isend_irecv", "barrier"),
}
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names}  # by canonical name

# [Note: canonical name] One operation has many names: "all_gather_into_tensor" and "all_gather_single" of
# torch.distributed, "c10d::_allgather_base_" of a profile, "nccl:_all_gather_base" of the flight recorder,
# "allgather_fn" of DeepSpeed. They differ in what stands around the operation's words. This is taken off until what is
# left is in `RULES`.
_NAMESPACE = re.compile(r"^.*[:.](?=\w)")
_PEERS = re.compile(r"\s+\d*\s*(->|<-)\s*\d*$")  # the flight recorder's "nccl:send 0->1"
_PREFIXES = ("legacy_", "inference_", "monitored_")
_SUFFIXES = (
    *("_autograd", "_base", "_coalesced", "_fn", "_inplace", "_into_tensor", "_list", "_object", "_out", "_single"),
    *("_tensor", "_any_source", "_anysource", "_v", "v"),
)
_SPELLED = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_reduce_barrier": "barrier",  # a barrier of NCCL is an all-reduce
    "isend": "send",
    "irecv": "recv",
    "batch_p2p_ops": "batch_isend_irecv",
    "permute": "all_to_all",  # functional permute_tensor
}


@functools.lru_cache(maxsize=4096)
def canonical_name(name: str) -> str:
    """Return the one name of an operation that torch, its recorders and DeepSpeed call differently.

    A name of no known operation is returned as it is, without the flight recorder's peers.

    >>> canonical_name("nccl:_all_gather_base"), canonical_name("_c10d_functional.all_reduce"), canonical_name("my_op")
    ('all_gather', 'all_reduce', 'my_op')
    """
    plain = _PEERS.sub("", name.strip())
    words = plain.removesuffix(".default").removesuffix(".out")
    words = _NAMESPACE.sub("", words).strip("_").lower()
    for prefix in _PREFIXES:
        words = words.removeprefix(prefix)
    while True:
        for spelled, meant in _SPELLED.items():
            if words == spelled or words.startswith(spelled + "_"):
                words = meant + words[len(spelled) :]
                break
        if words in RULES:
            return words
        suffix = next((suffix for suffix in _SUFFIXES if words.endswith(suffix)), None)
        if suffix is None:
            return plain
        words = words.removesuffix(suffix)


def rule_of(name: str) -> Rule | None:
    """Return the rule of an operation under any of its names, or ``None`` where no formula is known."""
    return RULES.get(canonical_name(name))


def calc_bw_log(comm_op: str, size: int, duration: float, *, group_size: int | None = None) -> tuple[float, float]:
    """Return algorithm and bus bandwidth of one operation, in Gbit/s (nccl-tests prints GB/s, an eighth of it).

    Args:
        comm_op: the operation, by any name that torch or deepspeed.comm has for it, see `canonical_name`.
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
    rule = rule_of(comm_op)
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

"""Reads in flight on a GPU: the host has returned what they read, and knows later whether another rank failed.

[Note: deferred] On a GPU the host does not wait for what it reads. A rank that fails raises at once, and sends NaN. All
ranks, this one too, raise the error at their next call: a read of one parameter once it has joined its collective, any
other call before its first, so that all ranks stay in step. So a call waits for the read before it, and never for its
own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

unchecked: deque[Callable[[], None]] = deque()  # the oldest read first


def defer(check: Callable[[], None]) -> None:
    """Have the next call make a check, which waits for the read and raises what another rank failed with."""
    unchecked.append(check)


def check_earlier(newest: int = 0) -> None:
    """Make the checks that were deferred, but for the newest ones."""
    while len(unchecked) > newest:
        unchecked.popleft()()


def synchronize() -> None:
    """Wait for the reads that are in flight on GPUs, and raise what another rank could not deliver.

    On a GPU ``safe_get_full_*`` returns before the data is there: an error of another rank, whose data is NaN, is
    raised by the next call of ds-fragment, or here. A rank with nothing to send that fails raises alone. It is no
    collective call. On CPUs there is nothing to wait for.

    Raises:
        FragmentError: the error of the lowest failing rank.
    """
    check_earlier()

"""Take items of an iterator away."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ds_loader.errors import LoaderStateError


def drop(iterator: Iterator[Any], count: int, may_fail: int = 0) -> None:
    """Take items away, of which so many may raise instead: they were left out before, too.

    Raises:
        LoaderStateError: there are fewer.
    """
    taken = 0
    while taken < count and may_fail:
        try:
            next(iterator)
        except StopIteration:
            break
        except Exception:
            may_fail -= 1
        taken += 1
    taken += taken_from(iterator, count - taken)
    if taken < count:
        raise too_few(count, taken)


def taken_from(iterator: Iterator[Any], count: int) -> int:
    """Take at most ``count`` items away; how many there were."""
    last = deque(enumerate(islice(iterator, count), 1), maxlen=1)
    return last[0][0] if last else 0


def too_few(count: int, found: int) -> LoaderStateError:
    """The error of a source with fewer batches than a state says were handed out."""
    return LoaderStateError(
        f"the state says that {count} batches of this epoch were handed out, but the source has {found}: "
        "is it the same data, batch size and number of ranks?"
    )

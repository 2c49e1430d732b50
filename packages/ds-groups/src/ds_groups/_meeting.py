"""`Round`: some ranks meet in the key-value store, compare what they hold, and learn one verdict.

[Note: rounds] A round is entered once by each of its members and ends with one verdict, whoever writes it first:
``go`` (all came and hold the same), ``differences``, ``broken`` (somebody gave up), ``failed`` or ``deadlock``. Every
member of a round reads the same verdict. A decided round is never entered: who finds a verdict goes to the next one.
So ranks that gave up at different times, or a different number of times, meet again in the first round that is open.

[Note: tree] Members stand in buckets of 16, these in buckets of 16, and so on. A bucket is one integer in the store:
bit ``s`` says that the member (or the whole bucket) in slot ``s`` came, bit ``16 + s`` that something different is
held there. Who completes a bucket counts it in one level up; who completes the last one gives the verdict. A rank
does a few operations, and the integers name those who did not come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

FAN_OUT = 16
READS = 32  # buckets that one question may read
_PLANS = 16  # different texts that are kept apart
_ALL = (1 << FAN_OUT) - 1

Verdict = Mapping[str, Any]
Runs = list[list[int]]  # first and last of each run, both included


class Part(NamedTuple):
    """Members that a round waits for: those at the places ``first`` to ``last``, or, if several, some of them."""

    first: int
    last: int


class NotMetError(Exception):
    """Members of a meeting did not come in time.

    Attributes:
        missing: who, as far as it was read.
        spelled: the same for people to read.
        picture: lines that say who waits for whom.
    """

    def __init__(self, missing: tuple[int, ...], spelled: str, picture: str) -> None:
        super().__init__(spelled)
        self.missing = missing
        self.spelled = spelled
        self.picture = picture


class Round:
    """One meeting of ``size`` members.

    Args:
        store: that all members share.
        base: what the round's keys begin with; nobody else uses it.
        size: how many members there are.
    """

    def __init__(self, store: Store, base: str, size: int) -> None:
        self.base = base
        self._store = store
        self._verdict = f"{base}/verdict"
        self._counts = [size]  # members, buckets of members, buckets of these, ...
        while self._counts[-1] > FAN_OUT:
            self._counts.append(-(-self._counts[-1] // FAN_OUT))

    @property
    def buckets(self) -> int:
        """How many integers hold who came."""
        return sum(-(-count // FAN_OUT) for count in self._counts)

    def verdict(self) -> Verdict | None:
        """The verdict, if there is one."""
        return self._read() if self._store.check([self._verdict]) else None

    def arrive(self, place: int, text: str) -> Verdict | None:
        """Count in the member at ``place``, which holds ``text``. Returns the verdict if it was the last one."""
        held: dict[str, Runs] = {}
        expected = self._store.compare_set(f"{self.base}/text", "", text).decode()
        if expected != text:
            held = {text: [[place, place]]}
        index = place
        for level, count in enumerate(self._counts):
            bucket, slot = divmod(index, FAN_OUT)
            if held:
                self._store.set(self._held_key(level, index), json.dumps(held))
            mark = (1 << slot) + ((1 << (FAN_OUT + slot)) if held else 0)
            mask = self._store.add(self._bucket_key(level, bucket), mark)
            width = min(FAN_OUT, count - bucket * FAN_OUT)
            if mask & _ALL != (1 << width) - 1:
                return None
            differing = [index - slot + other for other in range(width) if (mask >> (FAN_OUT + other)) & 1]
            held = _merge(json.loads(self._store.get(self._held_key(level, other))) for other in differing)
            index = bucket
        return self.decide({"differences": held, "others": expected} if held else {"go": True})

    def wait(self, seconds: float) -> Verdict | None:
        """The verdict, waiting for it no longer than ``seconds``."""
        try:
            self._store.wait([self._verdict], timedelta(milliseconds=max(1, round(seconds * 1000))))
        except RuntimeError:  # so says every store that the time is up, or that it was lost: the next question tells
            return self.verdict()
        return self._read()

    def decide(self, verdict: Verdict) -> Verdict:
        """Write ``verdict`` unless there is one; returns the one that stands."""
        standing: Verdict = json.loads(self._store.compare_set(self._verdict, "", json.dumps(verdict)))
        return standing

    def missing(self, reads: int = READS) -> list[Part]:
        """Who has not come yet: exactly, as far as this many reads go."""
        parts: list[Part] = []
        absent = [0]  # incomplete buckets of the level
        for level in reversed(range(len(self._counts))):
            below: list[int] = []
            for bucket in absent:
                if reads == 0:
                    parts.append(self._part(level + 1, bucket))
                    continue
                reads -= 1
                mask = self._store.add(self._bucket_key(level, bucket), 0)
                first = bucket * FAN_OUT
                width = min(FAN_OUT, self._counts[level] - first)
                below += [first + slot for slot in range(width) if not (mask >> slot) & 1]
            absent = below
        return sorted([*parts, *(Part(place, place) for place in absent)])

    def is_missing(self, place: int) -> bool:
        """Whether the member at ``place`` has not come yet."""
        mask = self._store.add(self._bucket_key(0, place // FAN_OUT), 0)
        return not (mask >> place % FAN_OUT) & 1

    def _read(self) -> Verdict:
        verdict: Verdict = json.loads(self._store.get(self._verdict))
        return verdict

    def _part(self, level: int, index: int) -> Part:
        width = FAN_OUT**level
        return Part(index * width, min((index + 1) * width, self._counts[0]) - 1)

    def _bucket_key(self, level: int, bucket: int) -> str:
        return f"{self.base}/came/{level}/{bucket}"

    def _held_key(self, level: int, index: int) -> str:
        return f"{self.base}/held/{level}/{index}"


def spell(ranks: Sequence[int]) -> str:
    """Spell ranks, runs as intervals: ``ranks 0-2, 5``."""
    spelled = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in _runs(ranks))
    return f"rank {spelled}" if len(ranks) == 1 else f"ranks {spelled}"


def _runs(numbers: Iterable[int]) -> Runs:
    runs: Runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _merge(summaries: Iterable[Mapping[str, Runs]]) -> dict[str, Runs]:
    """Join what buckets hold: text -> places, in their order. Beyond so many texts, ``""`` has the places."""
    found: dict[str, Runs] = {}
    for summary in summaries:
        for text, runs in summary.items():
            into = found.setdefault(text if text in found or len(found) < _PLANS else "", [])
            for first, last in runs:
                if into and into[-1][1] + 1 == first:
                    into[-1][1] = last
                else:
                    into.append([first, last])
    return found

"""Rounds of a meeting in the store: one verdict, who is missing, who differs, and how little a rank reads."""

from __future__ import annotations

import json
import threading

import pytest
from ds_groups._meeting import READS, NotMetError, Part, Round, spell
from ds_groups._verify import mismatch
from ds_groups._waits import READS as LOOK_READS, Wait, Waits


class CountingStore:
    """A store in this process that counts operations by the rank that does them."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}

    def start(self):
        self.counts = dict.fromkeys(("check", "get", "set", "add", "wait", "compare_set"), 0)

    def check(self, keys):
        self.counts["check"] += len(keys)
        return all(key in self.values for key in keys)

    def get(self, key):
        self.counts["get"] += 1
        return self.values[key]

    def set(self, key, value):
        self.counts["set"] += 1
        self.values[key] = value.encode()

    def add(self, key, amount):
        self.counts["add"] += 1
        self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
        return int(self.values[key])

    def compare_set(self, key, expected, desired):
        self.counts["compare_set"] += 1
        if self.values.get(key, b"") == expected.encode():
            self.values[key] = desired.encode()
        return self.values[key]

    def wait(self, keys, timeout):
        self.counts["wait"] += 1
        if not all(key in self.values for key in keys):
            raise RuntimeError("wait timeout")


def arrive_all(store, size, text_of=lambda place: "{}", absent=()):
    """Let members arrive one after the other; returns the most operations that one of them did."""
    most = 0
    store.start()
    for place in range(size):
        if place not in absent:
            store.start()
            Round(store, "r", size).arrive(place, text_of(place))
            most = max(most, sum(store.counts.values()))
    return most


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 256, 257, 4096, 4097, 70000])
def test_the_last_member_gives_the_verdict(size):
    store = CountingStore()
    most = arrive_all(store, size, absent=(size - 1,))
    assert Round(store, "r", size).verdict() is None
    store.start()
    assert Round(store, "r", size).arrive(size - 1, "{}") == {"go": True}
    assert sum(store.counts.values()) < 10
    assert most < 10
    assert Round(store, "r", size).wait(1.0) == {"go": True}


@pytest.mark.parametrize("order", [range(300), range(299, -1, -1), sorted(range(300), key=lambda n: n * 7 % 300)])
def test_the_order_of_arrival_does_not_matter(order):
    store = CountingStore()
    store.start()
    verdicts = [Round(store, "r", 300).arrive(place, "{}") for place in order]
    assert verdicts == [None] * 299 + [{"go": True}]


@pytest.mark.parametrize(
    ("size", "absent"),
    [(2, {0}), (16, {3, 15}), (17, {16}), (300, {0, 17, 299}), (4096, {5, 600, 4095}), (70000, {1, 69999})],
)
def test_few_missing_members_are_named_exactly(size, absent):
    store = CountingStore()
    arrive_all(store, size, absent=absent)
    store.start()
    assert Round(store, "r", size).missing() == [Part(place, place) for place in sorted(absent)]
    assert sum(store.counts.values()) <= READS
    assert [place for place in range(min(size, 300)) if Round(store, "r", size).is_missing(place)] == [
        place for place in sorted(absent) if place < 300
    ]


def test_many_missing_members_are_named_by_parts():
    size = 70000
    store = CountingStore()
    absent = {place for place in range(size) if place % 3 == 0}
    arrive_all(store, size, absent=absent)
    store.start()
    parts = Round(store, "r", size).missing()
    assert sum(store.counts.values()) <= READS
    covered = [place for first, last in parts for place in range(first, last + 1)]
    assert len(set(covered)) == len(covered)
    assert set(covered) >= absent  # nobody who is missing is left out
    assert all(first in absent for first, last in parts if first == last)


def test_a_round_has_one_verdict():
    store = CountingStore()
    store.start()
    first, second = Round(store, "r", 2), Round(store, "r", 2)
    first.arrive(0, "{}")
    assert first.wait(0.01) is None
    assert first.decide({"broken": first.missing()}) == {"broken": [[1, 1]]}
    assert second.arrive(1, "{}") == {"broken": [[1, 1]]}  # the last one does not overrule it
    assert first.verdict() == second.verdict() == {"broken": [[1, 1]]}


@pytest.mark.parametrize("size", [3, 16, 40, 5000])
@pytest.mark.parametrize("others", [(0,), (1, 2), (2,)])
def test_differences_hold_every_rank(size, others):
    def text_of(place):
        return json.dumps({"tp": 4 if place in others else 2, "pp": 1})

    store = CountingStore()
    assert arrive_all(store, size, text_of) < 100
    error = mismatch(Round(store, "r", size).verdict(), [10 * place for place in range(size)])
    rest = tuple(10 * place for place in range(size) if place not in others)
    assert error.differences == {"tp": {"4": tuple(10 * place for place in others), "2": rest}}


def test_half_of_the_ranks_differ():
    store = CountingStore()
    assert arrive_all(store, 4096, lambda place: json.dumps({"tp": place // 7 % 2})) < 100
    values = mismatch(Round(store, "r", 4096).verdict(), range(4096)).differences["tp"]
    assert values == {str(side): tuple(rank for rank in range(4096) if rank // 7 % 2 == side) for side in (0, 1)}


def test_every_rank_differs():
    store = CountingStore()
    assert arrive_all(store, 4096, lambda place: json.dumps({"seed": place})) < 100
    values = mismatch(Round(store, "r", 4096).verdict(), range(4096)).differences["seed"]
    assert sorted(rank for ranks in values.values() for rank in ranks) == list(range(4096))
    exact = {value: ranks for value, ranks in values.items() if value != "others"}
    assert all(ranks == (int(value),) for value, ranks in exact.items())
    assert len(exact) >= 16


def test_many_threads_arrive_at_once():
    from torch.distributed import HashStore

    store, size = HashStore(), 200
    verdicts = [None] * size

    def member(place):
        meeting = Round(store, "r", size)
        verdicts[place] = meeting.arrive(place, "{}") or meeting.wait(20.0)

    threads = [threading.Thread(target=member, args=(place,)) for place in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert verdicts == [{"go": True}] * size


def test_spelling_of_ranks():
    assert spell([4]) == "rank 4"
    assert spell([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_errors_of_meetings_hold_the_ranks():
    assert NotMetError((3,), "rank 3", "").missing == (3,)


@pytest.mark.parametrize(("length", "found"), [(2, True), (8, True), (16, True), (60, False)])
def test_a_look_reads_little(length, found):
    store = CountingStore()
    store.start()
    waits = []
    for rank in range(length):  # each waits for its successor, in a pair of its own
        pair = (rank, (rank + 1) % length)
        meeting = Round(store, f"r{rank}", 2)
        meeting.arrive(0, "{}")
        waits.append(Wait(rank, f"pair {rank}", pair, meeting))
        Waits(store, rank).note(waits[-1])
    store.start()
    looking = Waits(store, 0)
    _, picture, cycle = looking.look(waits[0])
    assert sum(store.counts.values()) <= LOOK_READS + 1
    assert [wait.rank for wait in cycle] == (list(range(length)) if found else [])
    assert picture[0] == ("pair 0", (1,))
    if found:
        assert looking.stands(cycle)
        assert sum(store.counts.values()) < 100
        waits[-1].round.arrive(1, "{}")  # the last one's partner comes: something moves
        assert not looking.stands(cycle)

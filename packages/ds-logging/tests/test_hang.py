"""Asking and answering over a store, here a dict in one process. With real ranks it is tested where torch is."""

import logging
import threading
import time
from functools import partial

import pytest
from ds_logging._comms.operation import Operation
from ds_logging._hang.explainer import HangExplainer
from ds_logging._hang.states import RankState
from ds_logging.errors import ArgumentError

SECOND = 10**9


class DictStore:
    """What `HangExplainer` uses of torch.distributed's stores."""

    def __init__(self):
        self.values = {}
        self.lock = threading.Lock()
        self.broken = False

    def _check(self):
        if self.broken:
            raise RuntimeError("connection reset by peer")

    def add(self, key, amount):
        self._check()
        with self.lock:
            self.values[key] = str(int(self.values.get(key, 0)) + amount)
            return int(self.values[key])

    def set(self, key, value):
        self._check()
        self.values[key] = value

    def get(self, key):
        self._check()
        return self.values[key].encode()

    def check(self, keys):
        self._check()
        return all(key in self.values for key in keys)

    def delete_key(self, key):
        return self.values.pop(key, None) is not None


def op(sequence, *, done=False, started_ns=0):
    return Operation("all_reduce", "tp", (0, 1, 2), sequence, 8, "float32", started_ns, None, done, "all_reduce")


class World:
    """Ranks that share a store; rank 2 has not entered operation 7."""

    def __init__(self, **arguments):
        self.store = DictStore()
        self.operations = [[op(7)], [op(7)], [op(6, done=True)]]
        self.explainers = [
            HangExplainer(self.store, rank, 3, partial(self.state, rank), timeout=5.0, **arguments) for rank in range(3)
        ]

    def state(self, rank):
        return RankState(tuple(self.operations[rank]), 60 * SECOND)


@pytest.fixture
def world():
    made = World(hang_after=30.0)
    yield made
    for explainer in made.explainers:
        explainer.stop()


def answer(world, ranks):
    for rank in ranks:
        world.explainers[rank].start(poll_seconds=0.01)


def test_the_ranks_that_answer_are_asked(world):
    answer(world, [1, 2])
    text = world.explainers[0].explain()
    assert "3 of 3 ranks answer." in text
    assert "Rank 2 never entered all_reduce 7 of group tp, in which ranks 0, 1 wait" in text
    assert "for 60 s" not in text


def test_a_rank_that_does_not_answer_is_named_after_the_time_out(world):
    answer(world, [1])
    text = world.explainers[0].explain(timeout=0.2)
    assert "2 of 3 ranks answer." in text
    assert "Rank 2 does not answer: its process ended, no log records there, or something holds the GIL." in text


def test_two_ranks_that_ask_at_the_same_time_answer_each_other(world):
    texts = {}
    threads = [
        threading.Thread(target=lambda rank=rank: texts.update({rank: world.explainers[rank].explain()}))
        for rank in (0, 1)
    ]
    answer(world, [2])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all("3 of 3 ranks answer." in texts[rank] for rank in (0, 1))


def test_answers_are_counted_and_not_repeated(world):
    first, second = world.explainers[:2]
    assert second.answer_once() == 0
    first.explain(timeout=0.01)
    first.explain(timeout=0.01)
    assert second.answer_once() == 2
    assert second.answer_once() == 0


def test_old_requests_do_not_pile_up(world):
    for _ in range(50):
        world.store.add("requests", 1)
    assert world.explainers[0].answer_once() == 8


def test_answers_are_taken_out_of_the_store(world):
    answer(world, [1, 2])
    for _ in range(3):
        world.explainers[0].explain()
    for explainer in world.explainers:
        explainer.stop()
    assert [key for key in world.store.values if key.startswith("state/") and not key.endswith("/0")] == []


def test_a_state_that_cannot_be_read_is_said():
    store = DictStore()

    def fail():
        raise RuntimeError("no recorder")

    text = HangExplainer(store, 0, 1, fail).explain()
    assert "Rank 0 answers, but cannot say what it does: RuntimeError: no recorder." in text


def test_a_broken_store_is_said_and_never_raises(world):
    world.store.broken = True
    text = world.explainers[0].explain()
    assert "The store fails" in text
    assert "connection reset by peer" in text
    assert "all_reduce 7" in text  # what this rank itself is in
    assert world.explainers[0].poll() is False
    world.store.broken = False
    assert world.explainers[0].poll() is True


def check(world, rank, now_s, **more):
    world.explainers[rank].check(now_s * SECOND, world.operations[rank], **more)


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_a_hang_is_explained_once_by_the_lowest_rank_that_waits(world, caplog):
    world.operations[2], world.operations[0] = world.operations[0], world.operations[2]  # rank 0 is the late one
    logged = []
    for explainer in world.explainers:
        explainer.start(poll_seconds=0.01)
    for now_s in (20, 40, 41, 42, 43):
        for rank in (2, 1, 0):
            before = len(errors(caplog))
            check(world, rank, now_s)
            logged += [(rank, now_s)] * (len(errors(caplog)) - before)
    assert logged == [(1, 40)]
    assert "Rank 0 never entered all_reduce 7" in errors(caplog)[0]


def test_nothing_is_logged_before_the_time_or_without_one(world, caplog):
    check(world, 0, 29)
    unlimited = World()
    check(unlimited, 0, 10**6)
    assert errors(caplog) == []
    assert "requests" not in world.store.values


def test_operations_that_are_over_are_no_hang(world, caplog):
    world.explainers[0].check(10**6 * SECOND, [op(7, done=True)])
    assert errors(caplog) == []


def test_a_second_hang_is_explained_again(world, caplog):
    answer(world, [1, 2])
    check(world, 0, 40)
    assert len(errors(caplog)) == 1
    world.operations = [[op(7, done=True)]] * 3
    check(world, 0, 41)
    world.operations = [[op(8, started_ns=45 * SECOND)]] * 3
    world.state = lambda rank: RankState(tuple(world.operations[rank]), 80 * SECOND)
    check(world, 0, 80)
    assert len(errors(caplog)) == 2
    assert "all_reduce 8" in errors(caplog)[1]


def test_another_rank_takes_over_where_the_one_that_asked_has_ended(world, caplog):
    answer(world, [1, 2])
    world.store.add("asker/0", 1)  # a rank that was first, and ended
    check(world, 0, 40)
    assert errors(caplog) == []
    check(world, 0, 60)
    assert len(errors(caplog)) == 1


def test_a_wait_that_timed_out_is_explained_by_the_rank_that_asks(caplog):
    world = World()
    answer_on = world.explainers[0], world.explainers[2]
    for explainer in answer_on:
        explainer.start(poll_seconds=0.01)
    check(world, 1, 5, timed_out=True)
    check(world, 1, 5, timed_out=True)
    for explainer in answer_on:
        explainer.stop()
    assert len(errors(caplog)) == 1
    assert "Rank 2 never entered" in errors(caplog)[0]


def test_a_hang_is_explained_although_the_store_is_gone(world, caplog):
    world.store.broken = True
    check(world, 0, 40)
    check(world, 0, 41)
    assert len(errors(caplog)) == 1
    assert "The store fails" in errors(caplog)[0]


@pytest.mark.parametrize("arguments", [{"hang_after": 0}, {"hang_after": -1.0}, {"timeout": 0.0}])
def test_wrong_times(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        HangExplainer(DictStore(), 0, 1, lambda: RankState((), 0), **arguments)


def test_stopping_ends_the_thread():
    explainer = HangExplainer(DictStore(), 0, 1, lambda: RankState((), 0))
    explainer.start(poll_seconds=0.01)
    explainer.start()  # once is enough
    explainer.stop()
    explainer.stop()
    time.sleep(0)
    assert not [thread for thread in threading.enumerate() if thread.name == "ds-logging-hang"]

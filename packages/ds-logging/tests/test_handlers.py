import io
import logging
import logging.handlers
import queue
import re

import pytest
from ds_logging._log.handlers import LogHandler, RankFilter, handlers_above, is_console
from ds_logging._log.writer import StreamWriter
from ds_logging.logging import log_dist, logger


@pytest.fixture
def lone():
    """Make a tree of loggers that does not end at the root logger, where pytest listens."""
    parent, child = logging.getLogger("lone"), logging.getLogger("lone.child")

    def make():  # in the test itself: at its start pytest also listens to loggers that do not propagate
        parent.propagate = False
        parent.setLevel(logging.DEBUG)
        return parent, child

    yield make
    parent.propagate = True
    parent.handlers.clear()
    child.handlers.clear()


def test_the_filter_keeps_what_a_record_factory_set():
    record = logging.makeLogRecord({"rank": "tp1", "msg": "hello"})
    assert RankFilter().filter(record)
    assert (record.rank, record.rank_tag) == ("tp1", "[Rank tp1] ")


def test_a_record_factory_that_sets_a_rank_is_no_conflict(caplog):
    factory = logging.getLogRecordFactory()

    def with_rank(*args, **kwargs):
        record = factory(*args, **kwargs)
        record.rank = 7
        return record

    logging.setLogRecordFactory(with_rank)
    try:
        with caplog.at_level("INFO"):
            log_dist("factory")
    finally:
        logging.setLogRecordFactory(factory)
    assert [record.rank for record in caplog.records] == [7]


def test_the_rank_is_written_once_also_behind_a_queue(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    stream, records = io.StringIO(), queue.SimpleQueue()
    logger.addHandler(logging.handlers.QueueHandler(records))
    logger.setLevel("INFO")
    log_dist("tagged", ranks=[3])
    logger.warning("plain")
    handler = LogHandler(StreamWriter(stream))
    while not records.empty():
        handler.handle(records.get())
    lines = stream.getvalue().splitlines()
    assert [re.split("] (?:INFO|WARNING) ", line)[1].partition(" ")[2] for line in lines] == [
        "[Rank 3] tagged",
        "[Rank 3] plain",
    ]


def test_the_stream_is_todays_stderr(capsys):
    handler = LogHandler()
    handler.handle(logging.makeLogRecord({"msg": "late"}))
    out, err = capsys.readouterr()
    assert "late" in err
    assert out == ""


def test_a_process_without_stderr_is_quiet(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    handler = LogHandler()
    monkeypatch.setattr(handler, "handleError", lambda record: pytest.fail("an error was reported"))
    handler.handle(logging.makeLogRecord({"msg": "nobody hears"}))


def test_a_failing_stream_is_the_handlers_problem(monkeypatch):
    closed, reported = io.StringIO(), []
    closed.close()
    handler = LogHandler(StreamWriter(closed))
    monkeypatch.setattr(handler, "handleError", reported.append)
    record = logging.makeLogRecord({"msg": "lost"})
    handler.handle(record)
    assert reported == [record]


class Taker(logging.Handler):
    def emit(self, record):
        pass


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda other: None, False),
        (lambda other: other.setLevel(logging.ERROR), True),
        (lambda other: other.addFilter(lambda record: "two" not in record.getMessage()), True),
    ],
    ids=["takes all", "takes errors", "filters"],
)
def test_it_is_silent_for_what_another_handler_takes(lone, change, shown):
    parent, child = lone()
    stream = io.StringIO()
    child.addHandler(LogHandler(StreamWriter(stream)))
    child.warning("one")
    parent.addHandler(logging.NullHandler())
    child.warning("and one")
    other = Taker()
    change(other)
    parent.addHandler(other)
    child.warning("two")
    assert [line.rpartition("] ")[2] for line in stream.getvalue().splitlines()] == ["one", "and one", "two"][
        : 2 + shown
    ]


def test_a_standard_stream_or_a_terminal_is_the_console(tmp_path):
    import os
    import sys

    assert is_console(sys.stderr)
    assert is_console(sys.__stdout__)
    assert not is_console(io.StringIO())
    assert not is_console(None)
    with open(tmp_path / "log", "w") as file:
        assert not is_console(file)
    if hasattr(os, "openpty"):
        ends = os.openpty()
        with os.fdopen(ends[1], "w") as terminal:
            assert is_console(terminal)
        os.close(ends[0])


def test_of_two_fallbacks_the_nearest_writes(lone):
    parent, child = lone()
    near, far = io.StringIO(), io.StringIO()
    child.addHandler(LogHandler(StreamWriter(near)))
    parent.addHandler(LogHandler(StreamWriter(far)))
    child.warning("one")
    assert ("one" in near.getvalue(), far.getvalue()) == (True, "")


def test_a_fallback_on_an_unregistered_logger_writes(lone):
    stream = io.StringIO()
    private = logging.Logger("lone.child")  # not the one that getLogger returns, and without a parent
    private.addHandler(LogHandler(StreamWriter(stream)))
    lone()
    private.warning("one")
    assert "one" in stream.getvalue()


def test_handlers_above_stops_where_propagation_stops(lone):
    parent, child = lone()
    handler = logging.NullHandler()
    parent.addHandler(handler)
    assert list(handlers_above(child)) == [handler]

import argparse
import io
import json
import logging
import os
import stat
import threading
from dataclasses import dataclass

import pytest
from ds_logging import configure, logging as dist_logging
from ds_logging.errors import ArgumentError, LogLevelError, RanksError
from ds_logging.logging import (
    get_current_level,
    get_dist_msg,
    log_dist,
    log_dist_once,
    logger,
    print_configuration,
    print_dist,
    print_json_dist,
    set_log_level_from_string,
    should_log_le,
    warning_once,
)


@pytest.fixture
def records():
    """What a handler of the application gets, on the root logger."""
    found = []
    handler = logging.Handler()
    handler.emit = found.append
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def as_rank(monkeypatch):
    def set_rank(rank, world_size=4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return set_rank


def here():
    import sys

    frame = sys._getframe(1)
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def place(record):
    return record.pathname, record.lineno, record.funcName


@pytest.mark.parametrize("log", [log_dist, log_dist_once, logger.log_dist_once], ids=["log_dist", "once", "logger"])
def test_the_record_has_the_callers_place_and_rank(records, as_rank, log, request):
    as_rank(2)
    _, expected = log(f"here {request.node.name}", ranks=[2], level=logging.ERROR), here()
    record = records[-1]
    assert place(record) == expected
    assert record.rank == 2
    assert record.levelno == logging.ERROR
    assert record.name == "ds"
    assert record.getMessage() == f"[Rank 2] here {request.node.name}"


def test_warning_once_has_the_callers_place(records):
    _, first = warning_once("placed"), here()
    _, second = logger.warning_once("placed too"), here()
    assert [place(record) for record in records] == [first, second]


def test_stacklevel_reports_the_callers_caller(records):
    def helper():
        log_dist("from a helper", stacklevel=2)

    _, expected = helper(), here()
    assert place(records[0]) == expected


@pytest.mark.parametrize(("ranks", "logging_ranks"), [(None, [0]), ([-1], [0, 1, 2, 3]), ([1, 3], [1, 3]), ([], [])])
def test_who_logs(records, as_rank, ranks, logging_ranks):
    for rank in range(4):
        as_rank(rank)
        log_dist("who", ranks=ranks)
    assert [record.rank for record in records] == logging_ranks


def test_a_wrong_selection_raises_on_ranks_that_would_not_log(records, as_rank):
    for rank in range(4):
        as_rank(rank)
        with pytest.raises(RanksError, match=r"ranks=\[-2\]"):
            log_dist("nobody", ranks=[-2])
        with pytest.raises(LogLevelError):
            log_dist("nobody", ranks=[3], level="loud")
        log_dist("some that are not there", ranks=[2, 4, 99])
    assert [record.rank for record in records] == [2]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (("plain", [2]), "plain"),
        (("plain", (1, 2), logging.ERROR), "plain"),
        (("plain", [2], "error"), "plain"),
        (("50% done", [2]), "50% done"),
        (("100%", [-1]), "100%"),
        (("one %s of two", [2], logging.ERROR), "one %s of two"),  # one placeholder, two arguments: ranks and level
        (({"loss": 1}, [2]), "{'loss': 1}"),
    ],
)
def test_deepspeeds_order_of_arguments(records, as_rank, call, wanted):
    as_rank(2)
    log_dist(*call)
    log_dist(call[0], None, *call[2:])  # rank 0 only
    assert [record.getMessage() for record in records] == [f"[Rank 2] {wanted}"]
    assert records[0].levelno == (logging.ERROR if len(call) == 3 else logging.INFO)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (("loss %.2f", 1.234), "loss 1.23"),
        (("shape %s", [4, 2]), "shape [4, 2]"),
        (("%s and %d%%", "a", 3), "a and 3%"),
        (("%(loss)s of %(step)s", {"loss": 1, "step": 2}), "1 of 2"),
        (("value %s", None), "value None"),
    ],
)
def test_percent_arguments(records, call, wanted):
    log_dist(*call, level="error")
    assert [record.getMessage() for record in records] == [f"[Rank 0] {wanted}"]


@pytest.mark.parametrize(
    ("call", "named", "error"),
    [
        (("x", 3), {}, RanksError),
        (("x", [0], 20, 1), {}, ArgumentError),
        (("x", [0]), {"ranks": [0]}, ArgumentError),
        (("x", [0], 20), {"level": 30}, ArgumentError),
    ],
)
def test_arguments_that_fit_nothing_are_errors(records, call, named, error):
    with pytest.raises(error):
        log_dist(*call, **named)
    assert records == []


def test_a_list_that_could_be_ranks_is_taken_for_the_argument_with_a_warning(records):
    for _ in range(2):
        log_dist("what %s", [-1])
    assert [record.levelname for record in records] == ["WARNING", "INFO", "INFO"]
    assert "write ranks=[-1]" in records[0].getMessage()
    assert records[1].getMessage() == "[Rank 0] what [-1]"


class Explosive:
    def __str__(self):
        raise ValueError("boom")

    __repr__ = __str__


@pytest.mark.parametrize("log", [log_dist, log_dist_once, logger.info, warning_once, logger.warning_once])
def test_a_hidden_line_is_not_formatted(as_rank, log):
    as_rank(1)
    logger.setLevel(logging.CRITICAL)
    log(Explosive())
    log("%s", Explosive())
    logger.setLevel(logging.INFO)
    if log in (log_dist, log_dist_once, logger.info):
        log(Explosive())
        log("%s", Explosive())


@pytest.mark.parametrize("log", [log_dist, log_dist_once, logger.error, warning_once])
@pytest.mark.parametrize("arguments", [(Explosive(),), ("%s", Explosive()), ("%d", "three"), ("%s %s", "one")])
def test_a_line_that_cannot_be_formatted_does_not_end_the_run(log, arguments, capsys, monkeypatch):
    configure(stream=io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's handlers raise, for a test to fail
    log(*arguments)
    assert "was not written" in capsys.readouterr().err
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log(*arguments, stacklevel=1)
    assert capsys.readouterr().err == ""


def test_an_extra_that_logging_refuses_is_renamed(records):
    log_dist("x", extra={"message": 1, "loss": 2})
    assert (records[0].extra_message, records[0].extra_loss) == (1, 2)


def test_exceptions_and_extras_go_with_the_record(records):
    try:
        raise KeyError("lost")
    except KeyError:
        log_dist("failed", level="error", exc_info=True, extra={"step": 3})
    assert records[0].exc_info[0] is KeyError
    assert records[0].step == 3


def test_a_message_is_taken_literally(records):
    log_dist("100% of %s {x} %(y)s")
    log_dist({"loss": 1})
    assert [record.getMessage() for record in records] == ["[Rank 0] 100% of %s {x} %(y)s", "[Rank 0] {'loss': 1}"]


def test_get_dist_msg(as_rank):
    as_rank(1)
    assert get_dist_msg("hello", [1]) == "[Rank 1] hello"
    assert get_dist_msg("hello", [-1]) == "[Rank 1] hello"
    assert get_dist_msg("hello") is None


def test_once_is_by_message_ranks_and_level(records):
    for _ in range(3):
        log_dist_once("once a")
        log_dist_once("once a", ranks=[-1])
        log_dist_once("once a", ranks=iter([-1]))
        log_dist_once("once a", level="warning")
        log_dist_once("once b")
    assert len(records) == 4


def test_once_does_not_count_while_its_level_is_off(caplog):
    caplog.set_level(logging.ERROR, logger="ds")
    log_dist_once("later")
    warning_once("later")
    caplog.set_level(logging.INFO, logger="ds")
    log_dist_once("later")
    warning_once("later")
    assert [record.getMessage() for record in caplog.records] == ["[Rank 0] later", "later"]


def test_warning_once_is_by_message_and_arguments_hashable_or_not(records):
    for _ in range(2):
        warning_once("shape %s", [1, 2])
        warning_once("shape %s", [3])
        warning_once("shape")
    assert [record.getMessage() for record in records] == ["shape [1, 2]", "shape [3]", "shape"]
    assert {record.levelno for record in records} == {logging.WARNING}


def test_print_dist_ignores_the_level(capsys, as_rank):
    as_rank(1)
    logger.setLevel(logging.CRITICAL)
    print_dist("shown", ranks=[1])
    print_dist("not shown", ranks=[0])
    assert capsys.readouterr() == ("[Rank 1] shown\n", "")
    with pytest.raises(RanksError):
        print_dist("x", ranks="all")


def test_print_json_dist_writes_a_whole_file_and_leaves_the_message_alone(tmp_path, as_rank):
    as_rank(1)
    message, path = {"loss": 1.5}, tmp_path / "out.json"
    path.write_text("old")
    umask = os.umask(0o022)
    try:
        print_json_dist(message, ranks=[0], path=path)
        assert path.read_text() == "old"
        path.unlink()
        print_json_dist(message, ranks=[1], path=str(path))
    finally:
        os.umask(umask)
    assert json.loads(path.read_text()) == {"loss": 1.5, "rank": 1}
    assert message == {"loss": 1.5}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # the group may read it, as any other file
    assert list(tmp_path.iterdir()) == [path]


def test_print_json_dist_replaces_nothing_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        print_json_dist({"a": 1}, path=path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("message", "words"), [([1], "no mapping"), ({"x": object()}, "cannot be written as JSON")])
def test_print_json_dist_checks_the_message_first(tmp_path, message, words):
    path = tmp_path / "out.json"
    with pytest.raises(ArgumentError, match=words):
        print_json_dist(message, path=path)
    assert not path.exists()


def test_print_json_dist_without_a_path_prints(capsys):
    print_json_dist({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1, "rank": 0}


@dataclass
class Settings:
    lr: float = 0.1
    batch: int = 8


@pytest.mark.parametrize(
    "args", [argparse.Namespace(lr=0.1, batch=8), Settings(), {"lr": 0.1, "batch": 8}], ids=["namespace", "data", "map"]
)
def test_print_configuration(records, as_rank, args):
    _, expected = print_configuration(args, "settings"), here()
    assert [record.getMessage().split() for record in records] == [
        ["[Rank", "0]", "settings:"],
        ["[Rank", "0]", "batch", "." * 24, "8"],
        ["[Rank", "0]", "lr", "." * 27, "0.1"],
    ]
    assert {place(record) for record in records} == {expected}
    as_rank(1)
    print_configuration(args, "settings")
    assert len(records) == 3


def test_print_configuration_of_nothing():
    with pytest.raises(ArgumentError, match="args=3 has no attributes"):
        print_configuration(3, "settings")


def test_levels_by_name():
    set_log_level_from_string("Error")
    assert get_current_level() == logger.level == logging.ERROR
    assert should_log_le("critical")
    assert should_log_le("error")
    assert not should_log_le("warning")
    with pytest.raises(LogLevelError, match="max_log_level_str=20"):
        should_log_le(20)
    with pytest.raises(LogLevelError):
        set_log_level_from_string("loud")
    assert logger.level == logging.ERROR


def test_log_levels_is_the_table_that_names_are_looked_up_in(monkeypatch):
    assert dist_logging.log_levels == {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
    for name, level in dist_logging.log_levels.items():
        assert dist_logging.get_log_level_from_string(name) == level
    monkeypatch.setitem(dist_logging.log_levels, "notice", 25)
    assert dist_logging.get_log_level_from_string("Notice") == 25


def test_setting_a_level_leaves_handlers_alone():
    mine, handler = logging.getLogger("mine"), logging.NullHandler()
    handler.setLevel(logging.ERROR)
    mine.addHandler(handler)
    set_log_level_from_string("debug", custom_logger=mine)
    assert (mine.level, handler.level) == (logging.DEBUG, logging.ERROR)


def test_threads_see_each_message_once(records):
    start = threading.Barrier(8)

    def work():
        start.wait()
        log_dist_once("from threads")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 1

import json
import logging
import math

import pytest
from ds_logging._log.formatters import JsonFormatter
from ds_logging._log.message import RankedMessage
from ds_logging._step import set_step


def as_json(**fields):
    record = logging.makeLogRecord({"levelname": "INFO", "name": "ds", "msg": "hello", "lineno": 3, **fields})
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


class Explosive:
    def __str__(self):
        raise ValueError("boom")

    __repr__ = __str__


def test_a_line_says_where_and_when():
    line = as_json(created=1.5)
    assert line["time"][4:5] == "-"
    assert line["time"][-6:-5] in "+-"  # a zone
    assert (line["level"], line["logger"], line["message"], line["line"]) == ("INFO", "ds", "hello", 3)
    assert {"rank", "local_rank", "world_size", "host", "pid", "file", "func"} <= set(line)
    assert not {"step", "restart", "worker", "exception"} & set(line)


def test_the_step_is_the_records_or_that_of_the_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    set_step(4)
    try:
        assert (as_json()["step"], as_json(step=9)["step"], as_json()["restart"]) == (4, 9, 2)
    finally:
        set_step(None)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, object(), {1: object()}, {(1, 2): 3}, Explosive(), b"\xff", "\udcff", {1, 2}]
)
def test_no_extra_and_no_message_raises(value):
    line = as_json(msg=value, extra_field=value, other=1)
    assert line["other"] == 1
    assert "extra_field" in line


def test_arguments_that_do_not_fit_are_named():
    assert as_json(msg="%d", args=("x",))["message"] == "<message cannot be formatted: TypeError>"


def test_an_exception_is_one_field_and_a_tag_is_no_part_of_the_message():
    try:
        raise KeyError("lost")
    except KeyError as error:
        line = as_json(
            msg=RankedMessage("[Rank 1] ", "failed %s", (3,)), exc_info=(KeyError, error, error.__traceback__)
        )
    assert line["message"] == "failed 3"
    assert "KeyError: 'lost'" in line["exception"]

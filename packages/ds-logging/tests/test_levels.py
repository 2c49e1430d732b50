import logging

import pytest
from ds_logging._log.levels import get_log_level_from_string, level_from_environment, parse_level
from ds_logging.errors import LogLevelError


@pytest.mark.parametrize("name", ["debug", "info", "warning", "error", "critical"])
def test_names_are_those_of_the_standard_library(name):
    for text in (name, name.upper(), f" {name.title()} "):
        assert get_log_level_from_string(text) == getattr(logging, name.upper())


def test_numbers():
    assert get_log_level_from_string("15") == parse_level(15) == parse_level("15") == 15


@pytest.mark.parametrize("level", ["loud", "", "-1", -1, True, None, 1.5, []])
def test_a_wrong_level_names_itself_and_the_choices(level):
    with pytest.raises(LogLevelError) as error:
        parse_level(level)
    assert f"level={level!r}" in str(error.value)
    assert "debug, info, warning, error, critical" in str(error.value)


@pytest.mark.parametrize("level", [20, None])
def test_the_string_function_wants_a_string(level):
    with pytest.raises(LogLevelError, match="log_level_str="):
        get_log_level_from_string(level)


def test_the_environment():
    assert level_from_environment({}) is None
    assert level_from_environment({"DS_LOG_LEVEL": " "}) is None
    assert level_from_environment({"DS_LOG_LEVEL": "Debug"}) == logging.DEBUG
    with pytest.raises(LogLevelError, match="DS_LOG_LEVEL='verbose'"):
        level_from_environment({"DS_LOG_LEVEL": "verbose"})


@pytest.mark.parametrize(
    ("name", "number"), [("warn", 30), ("FATAL", 50), ("notset", 0), ("Trace5", 5), ("verbose", 15)]
)
def test_names_that_logging_knows_are_levels(monkeypatch, name, number):
    for table in ("_levelToName", "_nameToLevel"):
        monkeypatch.setattr(logging, table, dict(getattr(logging, table)))
    logging.addLevelName(5, "TRACE5")
    logging.addLevelName(15, "Verbose")
    assert parse_level(name) == number

import logging

import pytest
from ds_logging._log.logger import LoggerFactory
from ds_logging.errors import ArgumentError, LogLevelError
from ds_logging.logging import get_current_level, logger


def test_a_script_that_configured_nothing_sees_log_dist_on_stderr(run_script):
    done = run_script("""
from ds_logging import log_dist
def train():
    log_dist("hello", ranks=[0])
    log_dist("again")
    log_dist("hidden", level="debug")
train()
""")
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "INFO script.py:4:train [Rank 0] hello",
        "INFO script.py:5:train [Rank 0] again",
    ]


def test_handlers_added_later_take_over_with_their_own_level(run_script):
    done = run_script("""
import logging
from ds_logging import log_dist, logger
log_dist("first")
assert logger.level == logging.NOTSET
logging.basicConfig(format="app %(message)s", level="WARNING")
log_dist("second")
log_dist("third", level="warning")
assert logger.level == logging.NOTSET
assert len(logger.handlers) == 1
""")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("[Rank 0] first")
    assert lines[1] == "app [Rank 0] third"


def test_a_record_between_the_two_is_shown_once(run_script):
    done = run_script("""
import logging
from ds_logging import log_dist, logger
log_dist("first")
logging.basicConfig(format="app %(message)s")
logger.warning("plain")
""")
    assert done.stderr.count("plain") == 1
    assert "app plain" in done.stderr


def test_a_level_chosen_for_the_root_stays_in_force(run_script):
    done = run_script("""
import logging
from ds_logging import log_dist
logging.getLogger().setLevel(logging.ERROR)
log_dist("hidden", level="warning")
log_dist("shown", level="error")
""")
    assert "hidden" not in done.stderr
    assert "shown" in done.stderr


@pytest.mark.parametrize(("value", "shown"), [("debug", "dx"), ("info", "x"), ("ERROR", ""), ("10", "dx")])
def test_an_environment_variable_sets_the_level(run_script, value, shown):
    done = run_script(
        """
from ds_logging import log_dist
log_dist("d", level="debug")
log_dist("x")
""",
        DS_LOG_LEVEL=value,
    )
    assert "".join(line[-1] for line in done.stderr.splitlines()) == shown


def test_a_wrong_environment_variable_is_reported_once_and_not_at_import(run_script):
    done = run_script(
        """
import sys
import ds_logging
print("imported", file=sys.stderr)
ds_logging.log_dist("x")
ds_logging.log_dist("y")
""",
        DS_LOG_LEVEL="loud",
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "imported"
    assert done.stderr.count("DS_LOG_LEVEL='loud'") == 1
    assert [line[-1] for line in lines[2:]] == ["x", "y"]


def test_a_level_set_before_import_beats_the_environment(run_script):
    run_script(
        """
import logging
logging.getLogger("ds").setLevel(logging.ERROR)
import ds_logging
assert ds_logging.logger.level == logging.ERROR
""",
        DS_LOG_LEVEL="debug",
    )


def test_before_init_only_the_launchers_rank_0_logs(run_script):
    code = "from ds_logging import log_dist; log_dist('mine'); log_dist('everybody', ranks=[-1])"
    first = run_script(code, RANK="0", WORLD_SIZE="2").stderr
    second = run_script(code, RANK="1", WORLD_SIZE="2").stderr
    assert "[Rank 0] mine" in first
    assert "[Rank 0] everybody" in first
    assert "mine" not in second
    assert "[Rank 1] everybody" in second


def test_the_level_is_told_before_anything_was_logged(run_script):
    run_script("""
import logging
from ds_logging.logging import get_current_level, logger, should_log_le
assert get_current_level() == logging.INFO and should_log_le("info") and not should_log_le("debug")
assert logger.handlers == [] and logger.level == logging.NOTSET
""")


def test_under_pytest_records_reach_caplog_and_no_handler_is_added(caplog):
    from ds_logging import log_dist

    caplog.set_level(logging.INFO)
    log_dist("captured")
    assert "[Rank 0] captured" in caplog.text
    assert logger.handlers == []
    assert logger.propagate
    assert get_current_level() == logging.INFO


def test_a_level_set_later_is_not_blocked_by_a_handler(run_script):
    done = run_script("""
from ds_logging import log_dist, logger, set_log_level_from_string
log_dist("x")
set_log_level_from_string("debug")
log_dist("d", level="debug")
""")
    assert [line[-1] for line in done.stderr.splitlines()] == ["x", "d"]


def test_create_logger_shows_records_once_and_propagates(run_script):
    done = run_script("""
import logging
from ds_logging.logging import LoggerFactory
for _ in range(2):
    mine = LoggerFactory.create_logger("mine", "info")
mine.info("one")
assert mine.propagate and len(mine.handlers) == 1
logging.basicConfig(format="app %(message)s")
mine.info("two")
""")
    assert done.stdout == ""
    assert done.stderr.count("one") == 1
    assert done.stderr.splitlines()[1:] == ["app two"]


@pytest.mark.parametrize("name", [None, "", 3])
def test_create_logger_wants_a_name(name):
    with pytest.raises(ArgumentError, match=f"name={name!r}"):
        LoggerFactory.create_logger(name)


def test_create_logger_checks_the_level_first():
    with pytest.raises(LogLevelError):
        LoggerFactory.create_logger("wrong level", "loud")
    assert "wrong level" not in logging.root.manager.loggerDict


def test_importing_the_package_anew_starts_anew(run_script):
    done = run_script("""
import sys
import ds_logging
ds_logging.configure("info")
for name in [name for name in sys.modules if name.split(".")[0] == "ds_logging"]:
    del sys.modules[name]
import ds_logging
assert ds_logging.logger.handlers == []
ds_logging.configure("info")
ds_logging.log_dist("one")
ds_logging.logger.info("two")
""")
    assert [line.partition("] ")[2].rpartition("] ")[2] for line in done.stderr.splitlines()] == ["one", "two"]

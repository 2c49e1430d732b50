import io
import logging
import sys

import pytest
from ds_logging import configure, log_dist, logger
from ds_logging.errors import ArgumentError, LogLevelError, MissingExtraError


def test_records_of_all_packages_are_shown_with_their_rank(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    stream = io.StringIO()
    configure(stream=stream)
    logging.getLogger("ds.groups").info("bound")
    log_dist("chosen", ranks=[2])
    logger.debug("hidden")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("[Rank 2] bound")
    assert lines[1].endswith("[Rank 2] chosen")
    assert lines[1].count("Rank") == 1
    assert "test_configure.py" in lines[1]
    assert "test_records_of_all_packages" in lines[1]


def test_stderr_is_the_default(capsys):
    configure()
    log_dist("to stderr")
    out, err = capsys.readouterr()
    assert out == ""
    assert "[Rank 0] to stderr" in err


def test_again_replaces_and_leaves_foreign_handlers():
    foreign = logging.NullHandler()
    logger.addHandler(foreign)
    first, second = io.StringIO(), io.StringIO()
    configure("debug", stream=first)
    handler = configure("error", stream=second)
    logger.error("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
    assert logger.handlers == [foreign, handler]
    assert logger.level == logging.ERROR
    assert handler.level == logging.NOTSET


def test_records_still_propagate_to_caplog(caplog):
    configure(stream=io.StringIO())
    log_dist("both")
    assert logger.propagate
    assert "both" in caplog.text


def test_it_takes_the_place_of_the_fallback(run_script):
    done = run_script("""
from ds_logging import configure, log_dist, logger
log_dist("one")
configure(format="mine %(message)s")
log_dist("two")
assert len(logger.handlers) == 1
""")
    assert done.stderr.splitlines()[1:] == ["mine [Rank 0] two"]


@pytest.mark.parametrize(
    ("environ", "before", "level", "wanted"),
    [
        (None, None, None, logging.INFO),
        ("debug", None, None, logging.DEBUG),
        ("debug", None, "error", logging.ERROR),
        ("debug", logging.WARNING, None, logging.WARNING),
        (None, logging.WARNING, 15, 15),
    ],
)
def test_which_level_counts(monkeypatch, environ, before, level, wanted):
    if environ:
        monkeypatch.setenv("DS_LOG_LEVEL", environ)
    if before:
        logger.setLevel(before)
    configure(level, stream=io.StringIO())
    assert logger.level == wanted


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"level": "loud"}, LogLevelError, "level='loud'"),
        ({"format": "%(nothing)s"}, ArgumentError, "format='%(nothing)s'"),
        ({"format": "no field"}, ArgumentError, "format='no field'"),
        ({"datefmt": 3, "format": "%(asctime)s"}, ArgumentError, "datefmt=3"),
        ({"stream": sys.stderr, "console": object()}, ArgumentError, "give one of them"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, error, words):
    kept = configure("error", stream=io.StringIO())
    with pytest.raises(error) as caught:
        configure(**arguments)
    assert words in str(caught.value)
    assert (logger.handlers, logger.level) == ([kept], logging.ERROR)


def test_a_wrong_environment_variable_is_an_error_here(monkeypatch):
    monkeypatch.setenv("DS_LOG_LEVEL", "loud")
    with pytest.raises(LogLevelError, match="DS_LOG_LEVEL='loud'"):
        configure()
    assert logger.handlers == []


def test_a_format_may_use_the_rank(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "5")
    stream = io.StringIO()
    configure(stream=stream, format="%(rank)03d %(levelname)s %(message)s")
    logger.info("hello")
    assert stream.getvalue() == "005 INFO hello\n"


def test_rich_without_rich_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ds-logging\[rich\]'"):
        configure(rich=True)
    assert logger.handlers == []


def test_rich_writes_to_the_given_console_above_a_progress_bar():
    console_module = pytest.importorskip("rich.console")
    from rich.progress import Progress

    out = io.StringIO()
    console = console_module.Console(file=out, force_terminal=True, width=150)
    configure(console=console)
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("training", total=2)
        for step in range(2):
            log_dist(f"[bold]step[/bold] {step}")
            progress.advance(task)
            progress.refresh()
    import re

    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    for step in range(2):
        line = next(line for line in lines if f"step[/bold] {step}" in line)
        assert "[Rank 0] [bold]step" in line  # markup is text
        assert "training" not in line  # the bar is never on a line of the log
        assert "test_configure.py" in line


def test_rich_on_a_stream_and_on_stderr(capsys):
    pytest.importorskip("rich")
    stream = io.StringIO()
    configure(rich=True, stream=stream, datefmt="[%Y]")
    log_dist("to a stream")
    assert "[Rank 0] to a stream" in stream.getvalue().replace("\n", " ")
    configure(rich=True)
    log_dist("to stderr")
    out, err = capsys.readouterr()
    assert "to stderr" in err
    assert out == ""

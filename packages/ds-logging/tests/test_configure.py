import io
import logging
import sys

import pytest
from ds_logging import configure, log_dist, log_dist_once, logger
from ds_logging.errors import ArgumentError, LogLevelError, MissingExtraError, RanksError


def test_records_of_all_packages_are_shown_with_their_rank(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    stream = io.StringIO()
    configure(stream=stream, ranks="all")
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
from ds_logging import configure, log_dist, log_dist_once, logger
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
        ({"stream": 3}, ArgumentError, "stream=3"),
        ({"json": True, "format": "%(message)s"}, ArgumentError, "give one of them"),
        ({"json": True, "rich": True}, ArgumentError, "give one of them"),
        ({"ranks": "0-"}, RanksError, "ranks='0-'"),
        ({"ranks": 0}, RanksError, "ranks=0"),
        ({"file": 7}, ArgumentError, "file=7"),
        ({"file": "run-{nobody}.log"}, ArgumentError, "{nobody}"),
        ({"file": "run-{rank.log"}, ArgumentError, "run-{rank.log"),
        ({"file": "/"}, ArgumentError, "is a folder"),
        ({"file": "/dev/null/run.log"}, ArgumentError, "no folder that can be written to"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, error, words):
    kept = configure("error", stream=io.StringIO())
    with pytest.raises(error) as caught:
        configure(**arguments)
    assert words in str(caught.value)
    assert (logger.handlers, logger.level) == ([kept], logging.ERROR)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DS_LOG_LEVEL", "loud", "DS_LOG_LEVEL='loud'"),
        ("DS_LOG_RANKS", "0-", "DS_LOG_RANKS='0-'"),
        ("DS_LOG_FORMAT", "%(nothing)s", "DS_LOG_FORMAT='%(nothing)s'"),
        ("DS_LOG_COLOR", "pink", "DS_LOG_COLOR='pink'"),
        ("DS_LOG_STREAM", "stdin", "DS_LOG_STREAM='stdin'"),
        ("DS_LOG_COLLAPSE", "maybe", "DS_LOG_COLLAPSE='maybe'"),
        ("DS_LOG_FILE", "run-{node}.log", "DS_LOG_FILE: file='run-{node}.log'"),
    ],
)
def test_a_wrong_variable_is_one_warning_that_names_it(monkeypatch, name, value, words):
    stream = io.StringIO()
    monkeypatch.setenv(name, value)
    configure(stream=stream)
    log_dist("one")
    log_dist("two")
    lines = stream.getvalue().splitlines()
    assert [words in line and "WARNING" in line for line in lines] == [True, False, False]


def test_a_format_may_use_the_rank(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "5")
    stream = io.StringIO()
    configure(stream=stream, ranks=[5], format="%(rank)03d %(levelname)s %(message)s")
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


def shown(stream):
    return [line.partition("[Rank ")[2].partition("] ")[2] for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "wanted"), [(None, {0}), ("0", {0}), ("all", {0, 1, 2, 3}), ("1-2", {1, 2}), ([3], {3}), ([], set())]
)
def test_ranks_gates_every_call_alike_and_no_warning(monkeypatch, ranks, wanted):
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        stream = io.StringIO()
        configure(stream=stream, ranks=ranks)
        log_dist("log_dist")
        log_dist_once(f"once {ranks} {rank}")
        logger.info("info")
        logging.getLogger("ds.groups").info("child")
        logger.log(15 + 5, "log")
        log_dist("explicit", ranks=[-1])
        logger.warning("warning")
        logging.getLogger("ds.groups").error("error")
        gated = ["log_dist", f"once {ranks} {rank}", "info", "child", "log"] if rank in wanted else []
        assert shown(stream) == [*gated, "explicit", "warning", "error"]
        assert logger.isEnabledFor(logging.INFO) == (rank in wanted)


def test_the_environment_configures_and_code_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("DS_LOG_RANKS", "all")
    monkeypatch.setenv("DS_LOG_FORMAT", "env %(message)s")
    monkeypatch.setenv("DS_LOG_FILE", str(tmp_path / "{rank}.log"))
    first, second = io.StringIO(), io.StringIO()
    configure(stream=first)
    logger.info("one")
    assert (first.getvalue(), (tmp_path / "1.log").read_text()) == ("env one\n", "env one\n")
    configure(stream=second, ranks="0", format="code %(message)s", file=tmp_path / "code.log")
    logger.info("two")
    logger.warning("three")
    assert (second.getvalue(), (tmp_path / "code.log").read_text()) == ("code three\n", "code three\n")
    assert (tmp_path / "1.log").read_text() == "env one\n"


def test_color_is_for_terminals(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def line(stream, **arguments):
        configure(stream=stream, format="%(levelname)s %(message)s", **arguments)
        logger.error("INFO x")
        return stream.getvalue()

    red = "\x1b[31mERROR\x1b[0m INFO x\n"
    assert line(Terminal()) == red
    assert line(io.StringIO()) == "ERROR INFO x\n"
    assert line(io.StringIO(), color=True) == red
    assert line(Terminal(), color=False) == "ERROR INFO x\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert line(Terminal()) == "ERROR INFO x\n"
    assert line(io.StringIO(), color=True) == red


def test_rich_off_a_terminal_writes_plain_single_lines():
    console_module = pytest.importorskip("rich.console")
    out = io.StringIO()
    configure(console=console_module.Console(file=out))
    log_dist("x" * 300)
    assert out.getvalue().count("\n") == 1
    stream = io.StringIO()
    configure(rich=True, stream=stream)
    log_dist("y" * 300)
    assert stream.getvalue().count("\n") == 1


def test_the_same_stream_is_not_written_twice():
    stream = io.StringIO()
    theirs = logging.StreamHandler(stream)
    theirs.setLevel(logging.WARNING)
    logging.getLogger().addHandler(theirs)
    try:
        configure(stream=stream)
        logger.info("ours")
        logger.warning("theirs")
    finally:
        logging.getLogger().removeHandler(theirs)
    assert stream.getvalue().count("ours") == stream.getvalue().count("theirs") == 1
    assert stream.getvalue().endswith("\ntheirs\n")

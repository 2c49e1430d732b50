import io
import logging
import os
import sys

import pytest
from ds_logging import configure, log_dist, logger
from ds_logging._log.writer import FileWriter, StreamWriter


def test_a_file_is_written_past_the_streams_buffer(tmp_path):
    with open(tmp_path / "log", "w") as file:
        file.write("before\n")
        writer = StreamWriter(file)
        writer.write("é")
        assert (tmp_path / "log").read_text(encoding="utf-8") == "before\né\n"


def test_whoever_replaces_write_sees_the_line(tmp_path):
    seen = []
    with open(tmp_path / "log", "w") as file:
        writer = StreamWriter(file)
        writer.write("one")
        file.write = seen.append
        writer.write("two")
    assert seen == ["two\n"]
    assert (tmp_path / "log").read_text() == "one\n"


def test_a_closed_stream_is_an_error_and_not_somebody_elses_file(tmp_path):
    file = open(tmp_path / "log", "w")  # noqa: SIM115
    writer = StreamWriter(file)
    writer.write("one")
    file.close()
    with open(tmp_path / "other", "w"), pytest.raises(ValueError, match="closed"):
        writer.write("two")
    assert (tmp_path / "other").read_text() == ""


@pytest.mark.parametrize("text", ["é🚀", "\udcff"])
def test_what_the_encoding_lacks_is_escaped(text):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    StreamWriter(stream).write(text)
    assert raw.getvalue().startswith(b"\\")


def test_a_rank_that_changes_gets_its_own_file(tmp_path, monkeypatch):
    writer = FileWriter(tmp_path / "new" / "run-{rank}.log")
    for rank in (0, 3, 3):
        monkeypatch.setenv("RANK", str(rank))
        writer.write(f"of {rank}")
        writer.close()
    assert (tmp_path / "new" / "run-0.log").read_text() == "of 0\n"
    assert (tmp_path / "new" / "run-3.log").read_text() == "of 3\nof 3\n"


def test_a_forked_child_writes_to_the_same_file_or_its_own(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    configure(file=tmp_path / "{pid}.log", stream=io.StringIO(), format="%(message)s")
    logger.info("parent")
    child = os.fork()
    if child == 0:
        try:
            logger.info("child")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / f"{os.getpid()}.log").read_text() == "parent\n"
    assert (tmp_path / f"{child}.log").read_text() == "child\n"


# A signal handler that logs in the middle of a line, and a fork in the middle of another thread's lines.
HARD = {
    "signals": """
import itertools, os, signal, sys, threading
from ds_logging import configure, log_dist, log_dist_once, warning_once
configure("info", stream=open(os.devnull, "w"))
seen = itertools.count()
done = False
def on_signal(*_):
    global done
    number = next(seen)
    log_dist("from a signal"); warning_once(f"s{number}"); log_dist_once(f"o{number}")
    done = number > 200
    if not done:
        signal.setitimer(signal.ITIMER_REAL, 0.0002)
signal.signal(signal.SIGALRM, on_signal)
signal.setitimer(signal.ITIMER_REAL, 0.0002)
turn = 0
while not done:
    turn += 1
    log_dist("line"); warning_once(f"w{turn}"); log_dist_once(f"x{turn}")
""",
    "forks": """
import os, threading
from ds_logging import configure, log_dist, warning_once
import sys
configure("info", file=sys.argv[1], stream=open(os.devnull, "w"))
stop = False
def work():
    turn = 0
    while not stop:
        turn += 1
        log_dist("x" * 200); warning_once(f"w{turn % 1000}")
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(60):
    child = os.fork()
    if child == 0:
        log_dist("child"); warning_once("child")
        os._exit(0)
    os.waitpid(child, 0)
stop = True
for thread in threads:
    thread.join()
""",
    "stderr closed": "import sys\nfrom ds_logging import log_dist\nsys.stderr.close(); log_dist('x')",
    "stderr None": "import sys\nfrom ds_logging import log_dist\nsys.stderr = None; log_dist('x')",
    "after shutdown": """
import logging
from ds_logging import log_dist, configure
configure()
logging.shutdown()
log_dist("x")
""",
    "daemon thread": """
import threading
from ds_logging import log_dist
started = threading.Event()
def work():
    while True:
        log_dist("x"); started.set()
threading.Thread(target=work, daemon=True).start()
started.wait()
""",
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.filterwarnings("ignore")
def test_a_line_never_ends_or_hangs_the_program(name, tmp_path):
    import subprocess

    if name in ("forks", "signals") and not hasattr(os, "fork"):
        pytest.skip("no fork")
    done = subprocess.run(
        [sys.executable, "-c", HARD[name], str(tmp_path / "log")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "was not written" not in done.stderr
    if name == "forks":
        lines = (tmp_path / "log").read_text().splitlines()
        assert sum("child" in line for line in lines) == 120
        assert all(line.startswith("[") for line in lines)


def test_the_handler_takes_no_lock():
    handler = configure(stream=io.StringIO())
    assert handler.lock is None
    log_dist("x")
    assert isinstance(handler, logging.Handler)

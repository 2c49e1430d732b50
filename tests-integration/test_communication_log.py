"""The example of a communication log runs as it stands, names the slow rank, and its files hold what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "communication_log.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


def test_the_example_names_the_slow_rank_and_writes_what_it_recorded(tmp_path: Path) -> None:
    done = _run("--ranks", "3", "--steps", "4", "--delay", "0.3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[Rank 0] step ") == 4
    assert "communication of 3 ranks" in done.stdout
    late = re.search(r"the others waited \d+ ms for rank (\d)", done.stdout)
    assert late is not None, done.stdout
    assert late[1] == "2"
    names = {"bandwidth.png", "timeline.png", "trace.json", *(f"operations-{rank}.jsonl" for rank in range(3))}
    assert {path.name for path in tmp_path.iterdir()} == names

    for rank in range(3):
        text = (tmp_path / f"operations-{rank}.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        operations = [line for line in lines if line["line"] == "operation"]
        assert {line["rank"] for line in lines} == {rank}
        reduced = [line["step"] for line in operations if line["kind"] == "all_reduce"]
        assert reduced == [0, 1, 2, 3]  # the loss of each step
        assert {line["kind"] for line in operations} == {"all_reduce", "all_gather", "reduce_scatter"}

    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    for rank in range(3):
        own = [event for event in events if event["pid"] == rank]
        ranges = [event["name"] for event in own if event.get("cat") == "range"]
        assert ranges == ["data", "forward", "backward", "optimizer"] * 4
        assert [event["args"]["step"] for event in own if event.get("cat") == "step"] == [0, 1, 2, 3]


def test_bad_options_are_refused_before_any_rank_starts(tmp_path: Path) -> None:
    done = _run("--ranks", "1", "--out", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "--ranks is 1 and --steps 8, expected at least 2 of each" in done.stderr
    assert not (tmp_path / "none").exists()

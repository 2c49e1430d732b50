import json
from collections import deque

import pytest
from ds_logging._comms.jsonl import to_jsonl
from ds_logging._comms.op_stats import OpKey, OpStats
from ds_logging._comms.operation import Operation
from ds_logging._files import write_atomically


def stats(raw_name="all_reduce", latencies=(2.0,)):
    made = OpStats(OpKey("grads", raw_name, 1000, 4, "1:tp", (0, 1, 2, 3), "float32"), deque())
    for latency in latencies:
        made.add(latency, 1000)
    return made


def load(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_line_for_each_kind_and_each_operation(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    operation = Operation("all_reduce", "1:tp", (0, 1, 2, 3), 12, 1000, "float32", 5, None, False, "grads", step=4)
    to_jsonl(tmp_path / "log.jsonl", [operation], [stats(), stats("all_shuffle"), stats(latencies=[None])])
    first, unknown, untimed, last = load(tmp_path / "log.jsonl")
    assert (first["line"], first["rank"], first["record_name"], first["group"], first["ranks"]) == (
        *("kind", 3, "grads", "1:tp"),
        [0, 1, 2, 3],
    )
    assert (first["count"], first["p50_latency_ms"], first["msg_size_bytes"]) == (1, 2.0, 1000)
    assert first["busbw_avg_gbps"] == pytest.approx(1000 * 8 / 2e-3 / 1e9 * 1.5)
    assert unknown["busbw_avg_gbps"] is None
    assert untimed["avg_latency_ms"] is None
    assert (last["line"], last["sequence"], last["latency_ms"], last["completed"], last["step"]) == (
        *("operation", 12),
        *(None, False, 4),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_nothing_is_an_empty_file(tmp_path):
    to_jsonl(tmp_path / "log.jsonl", [], [])
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, ["old"])

    def chunks():
        yield "new"
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        write_atomically(path, chunks())
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]

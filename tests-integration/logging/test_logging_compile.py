"""Log lines in compiled functions: no graph break, and the line is shown while it is traced."""

import io
import logging

import pytest
from ds_logging import configure, get_dist_msg, log_dist, log_dist_once, logger, print_dist, should_log_le, warning_once

torch = pytest.importorskip("torch")


@pytest.fixture
def stream():
    torch._dynamo.reset()
    handlers, level = list(logger.handlers), logger.level
    made = io.StringIO()
    configure("info", stream=made, format="%(filename)s:%(funcName)s> %(message)s")
    yield made
    torch._dynamo.reset()
    logger.handlers[:] = handlers
    logger.setLevel(level)


CALLS = {
    "log_dist": lambda x: log_dist("said"),
    "log_dist with arguments": lambda x: log_dist("said %s %d", "a", 3),
    "log_dist with a tensor": lambda x: log_dist("said %s", x),
    "log_dist with an f-string of a tensor": lambda x: log_dist(f"said {x.shape}"),
    "log_dist at a level": lambda x: log_dist("said", level="warning", ranks=[0]),
    "DeepSpeed's order": lambda x: log_dist("said", [0], logging.ERROR),
    "log_dist_once": lambda x: log_dist_once("said"),
    "warning_once": lambda x: warning_once("said %s", 3),
    "logger.info": lambda x: logger.info("said"),
    "logger.info with a tensor": lambda x: logger.info("said %s", x),
    "logger.log": lambda x: logger.log(logging.ERROR, "said"),
    "logger.warning": lambda x: logger.warning("said", extra={"a": 1}),
    "logger.error": lambda x: logger.error("said"),
    "logger.warning_once": lambda x: logger.warning_once("said 4"),
    "logger.log_dist_once": lambda x: logger.log_dist_once("said"),
}


def compiled_graphs(call):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x):
        y = x.sin()
        call(x)
        return y + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x = torch.ones(3)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), x.sin() + 1)
    return len(graphs)


@pytest.mark.parametrize("name", CALLS)
def test_a_line_is_shown_once_while_it_is_traced(stream, name):
    assert compiled_graphs(CALLS[name]) == 1
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("test_logging_compile.py:<lambda>> ")
    assert "while torch.compile traces" in lines[0]
    assert "said" in lines[0] or "only run time knows" in lines[0]


@pytest.mark.parametrize("name", CALLS)
def test_a_line_whose_level_is_off_breaks_no_graph(stream, name):
    logger.setLevel(logging.CRITICAL)
    assert compiled_graphs(CALLS[name]) == 1
    assert stream.getvalue() == ""


def test_a_line_of_another_rank_is_not_shown(stream):
    assert compiled_graphs(lambda x: log_dist("said", ranks=[1])) == 1
    assert compiled_graphs(lambda x: log_dist("said", ranks=[])) == 1
    assert stream.getvalue() == ""


def test_nothing_of_dynamos_configuration_is_changed_for_others(stream):
    other = logging.getLogger("other")
    compiled_graphs(lambda x: logger.info("said"))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"logging\.Logger"):
        compiled_graphs(lambda x: other.info("said"))


def test_levels_and_messages_are_constants(stream, capsys):

    def call(x):
        if not should_log_le("info") or should_log_le("debug"):
            raise AssertionError
        if get_dist_msg("m") != "[Rank 0] m" or get_dist_msg("m", [1]) is not None:
            raise AssertionError
        print_dist("printed")
        print_dist("not printed", ranks=[1])

    assert compiled_graphs(call) == 1
    out = capsys.readouterr().out
    assert out.count("[Rank 0] printed") == 1
    assert "not printed" not in out
    assert "while torch.compile traces" in out


def test_uncompiled_calls_are_not_touched(stream):
    compiled_graphs(lambda x: logger.info("said"))
    logger.info("plain")
    log_dist("plain")
    assert [line.partition("> ")[2] for line in stream.getvalue().splitlines()[1:]] == ["plain", "[Rank 0] plain"]

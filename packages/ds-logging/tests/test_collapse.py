import io

import pytest
from ds_logging import configure, log_dist
from ds_logging._log.collapse import _spell


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((1,), "rank 1"), ((1, 2, 3), "ranks 1-3"), ((1, 3, 4, 9), "ranks 1,3-4,9"), ((2, 5), "ranks 2,5")],
)
def test_ranks_are_spelled_as_they_are_configured(ranks, text):
    assert _spell(ranks) == text


def test_without_torch_distributed_each_line_is_shown():
    stream = io.StringIO()
    configure(stream=stream, ranks="all", collapse=True, format="%(message)s")
    log_dist("one")
    log_dist("one")
    assert stream.getvalue() == "[Rank 0] one\n" * 2

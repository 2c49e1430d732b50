"""Without matplotlib; the figure itself is tested where that is."""

import pytest
from ds_logging._comms.plot import plot_bandwidth
from ds_logging.errors import MissingExtraError


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install ds-logging\[plot\]"):
        plot_bandwidth([])

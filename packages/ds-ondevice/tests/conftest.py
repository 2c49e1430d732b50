import pytest
from ds_ondevice import _replay


@pytest.fixture
def replay_peak(monkeypatch):
    """A function that tells how many bytes a replay held at most since the test began."""
    peak = 0

    def run_and_look(self, op, run=_replay._Run.op, **options):
        nonlocal peak
        run(self, op, **options)
        peak = max(peak, sum(tensor.nbytes for _, tensor in self.made.values()))

    monkeypatch.setattr(_replay._Run, "op", run_and_look)
    return lambda: peak

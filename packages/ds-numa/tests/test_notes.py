from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from ds_numa import Binding, Topology
from ds_numa._notes import core_notes, environment_notes, gpu_notes, library_notes

TWO_CORES = Binding(0, (0, 1, 8, 9), 2, (0,))


@pytest.mark.parametrize(
    ("name", "value", "pins"),
    [
        ("OMP_PROC_BIND", "close", True),
        ("OMP_PROC_BIND", "FALSE", False),
        ("OMP_PLACES", "cores", True),
        ("KMP_AFFINITY", "granularity=fine,compact,1,0", True),
        ("KMP_AFFINITY", "disabled", False),
        ("GOMP_CPU_AFFINITY", "0-3", True),
        ("GOMP_CPU_AFFINITY", " ", False),
        ("OMP_NUM_THREADS", "4", False),
    ],
)
def test_other_pinning_is_named(name: str, value: str, pins: bool) -> None:
    notes = environment_notes({name: value})
    assert bool(notes) == pins
    assert all(f"{name} = {value!r} is set" in note for note in notes)


class FakeTorch(SimpleNamespace):
    def __init__(self, threads: int) -> None:
        super().__init__(threads=threads)

    def get_num_threads(self) -> int:
        return int(self.threads)

    def set_num_threads(self, number: int) -> None:
        self.threads = number


@pytest.mark.parametrize(
    ("threads", "set_threads", "after", "words"),
    [
        (16, False, 16, "keeps its 16 threads, more than the 2 advised here: call torch.set_num_threads(2)"),
        (16, True, 2, "torch.set_num_threads(2) was called"),
        (1, False, 1, ""),
        (1, True, 2, "torch.set_num_threads(2) was called"),
        (2, True, 2, ""),
    ],
)
def test_torch_counted_before(
    monkeypatch: pytest.MonkeyPatch, threads: int, set_threads: bool, after: int, words: str
) -> None:
    torch = FakeTorch(threads)
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    notes = library_notes(TWO_CORES, {}, set_threads=set_threads)
    assert (torch.threads, len(notes)) == (after, int(bool(words)))
    assert words in "".join(notes)


def test_numpy_counted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace())  # type: ignore[arg-type]
    assert "numpy was imported before" in library_notes(TWO_CORES, {}, set_threads=False)[0]
    assert library_notes(TWO_CORES, {"OPENBLAS_NUM_THREADS": "1"}, set_threads=False) == []
    monkeypatch.delitem(sys.modules, "numpy")
    assert library_notes(TWO_CORES, {}, set_threads=False) == []


BOX = {
    "nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}, "2": {"cpus": "8-11"}},
    "sockets": ["0-7", "8-11"],
    "core_classes": ["0-1,4-11", "2-3"],
    "gpus": [{"pci": f"0000:1{i}:00.0", "node": node} for i, node in enumerate([0, 1, 2, None])],
}


@pytest.mark.parametrize(
    ("cpus", "gpu", "words"),
    [
        ((4, 5), None, []),
        ((1, 2), None, ["fast and slow cores are mixed (1 + 1 CPUs"]),
        ((4, 5), 1, []),
        ((4, 5), 0, ["GPU 0000:10:00.0 hangs on node 0, on another node than"]),
        ((4, 5), 2, ["GPU 0000:12:00.0 hangs on node 2, on another socket than"]),
        ((4, 5), 3, []),
    ],
)
def test_odd_shares_are_named(cpus: tuple[int, ...], gpu: int | None, words: list[str]) -> None:
    binding = Binding(0, cpus, 2, (cpus[0] // 4,), gpu=None if gpu is None else f"0000:1{gpu}:00.0")
    box = Topology.from_dict(BOX)
    notes = core_notes(box, binding) + gpu_notes(box, binding)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))

"""Which of the two moves the fragments."""

from __future__ import annotations

import pytest
import torch
from ds_fragment import kernels
from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels import KernelError, choice, use_kernels
from ds_fragment.kernels.library import Loaded, load


def test_the_variable_decides_unless_a_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_FRAGMENT_KERNELS", raising=False)
    assert choice.chosen() == "auto"
    monkeypatch.setenv("DS_FRAGMENT_KERNELS", "cuda")
    assert choice.chosen() == "cuda"
    with use_kernels("reference"):
        assert choice.chosen() == "reference"
        with use_kernels("auto"):
            assert choice.chosen() == "auto"
        assert choice.chosen() == "reference"
    assert choice.chosen() == "cuda"


def test_the_choice_before_comes_back_after_an_error() -> None:
    before = choice.chosen()
    with pytest.raises(ZeroDivisionError), use_kernels("cuda"):
        raise ZeroDivisionError
    assert choice.chosen() == before


def test_a_choice_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match=r"choice is 'triton', expected one of auto, cuda, reference"):
        use_kernels("triton").__enter__()  # type: ignore[arg-type]
    monkeypatch.setenv("DS_FRAGMENT_KERNELS", "no")
    with pytest.raises(InvalidValueError, match=r"DS_FRAGMENT_KERNELS is 'no', expected one of"):
        choice.chosen()


def test_tensors_on_the_cpu_are_moved_whatever_was_chosen() -> None:
    for each in ("auto", "cuda", "reference"):
        out = torch.zeros(3)
        with use_kernels(each):
            kernels.copy([out], [torch.ones(3, dtype=torch.bfloat16)])
        assert out.tolist() == [1, 1, 1]


def test_a_device_without_kernels_falls_back_or_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    missing = load(tmp_path / "libds_fragment.so")
    monkeypatch.setattr(choice, "loaded", lambda: missing)
    device = torch.device("cuda", 0)
    with use_kernels("auto"):
        assert not choice.usable(device)
    with use_kernels("reference"):
        assert not choice.usable(device)
    expected = r"the CUDA kernels were asked for, but libds_fragment.so is not in this installation"
    with use_kernels("cuda"), pytest.raises(KernelError, match=expected):
        choice.usable(device)


def test_where_the_library_runs_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(Loaded, "why_not", lambda self, device: None if device == 0 else "too old")
    monkeypatch.setattr(choice, "loaded", lambda: Loaded(tmp_path, None, None))
    with use_kernels("auto"):
        assert choice.usable(torch.device("cuda", 0))
        assert not choice.usable(torch.device("cuda", 1))
    with use_kernels("cuda"), pytest.raises(KernelError, match="but too old"):
        choice.usable(torch.device("cuda", 1))

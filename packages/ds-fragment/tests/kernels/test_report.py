"""``python -m ds_fragment``: what is in use, and why."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from ds_fragment import __version__
from ds_fragment.kernels import choice, report, use_kernels, why_reference
from ds_fragment.kernels.library import Loaded, load


def test_the_report_names_the_reason_for_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = load(tmp_path / "libds_fragment.so")
    monkeypatch.setattr(choice, "loaded", lambda: missing)
    lines = report()
    assert lines["library"] == f"none: {missing.reason}"
    assert lines["in use"] == f"torch's own operators, because {missing.reason}"
    with use_kernels("reference"):
        assert report()["in use"] == f"torch's own operators, because {why_reference()}"
        assert "DS_FRAGMENT_KERNELS" in str(why_reference())


def test_the_report_describes_the_library(monkeypatch: pytest.MonkeyPatch, library: Loaded) -> None:
    monkeypatch.setattr(choice, "loaded", lambda: library)
    lines = report()
    assert lines["library"] == str(library.path)
    assert lines["architectures"] == library.architectures
    assert lines["compiled with"] == f"CUDA {library.toolkit}"
    assert lines["torch"].startswith(torch.__version__)
    if not torch.cuda.is_available():
        assert "because" in lines["in use"]


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_FRAGMENT_KERNELS", raising=False)
    monkeypatch.setattr(sys, "argv", ["ds_fragment"])
    runpy.run_module("ds_fragment", run_name="__main__")
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert printed["ds-fragment"] == __version__
    assert printed["choice"] == os.environ.get("DS_FRAGMENT_KERNELS", "auto")
    assert "library" in printed

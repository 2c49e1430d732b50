"""The ``ds-train-utils`` command."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch
from ds_train_utils import __version__, _report


def test_names_what_is_installed() -> None:
    report = _report.collect()
    assert set(report["distributions"]) == set(_report.DISTRIBUTIONS)
    assert all(report["distributions"].values())
    assert report["distributions"]["ds-train-utils"] == __version__
    assert report["torch"].startswith(torch.__version__)
    assert ("gloo" in report["backends"]) == torch.distributed.is_gloo_available()
    assert not [name for name, part in report.items() if isinstance(part, dict) and "error" in part]


def test_distributions_are_those_it_depends_on() -> None:
    try:
        required = metadata.requires("ds-train-utils") or []
    except metadata.PackageNotFoundError:
        pytest.skip("ds-train-utils is on the path, not installed")
    assert {need.partition("~=")[0] for need in required} == set(_report.DISTRIBUTIONS) - {"ds-train-utils"}


def test_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == _report.collect()


def test_text_has_a_line_for_every_fact() -> None:
    report = _report.collect()
    lines = dict(line.split(maxsplit=1) for line in _report.render(report).splitlines())
    assert set(lines) == {"python", "torch", "accelerator", "backends", "numa", "kernels", *_report.DISTRIBUTIONS}


def test_missing_parts_are_lines_and_not_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    def import_module(name: str) -> Any:
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(_report.metadata, "version", version)
    monkeypatch.setattr(_report, "import_module", import_module)
    assert _report.main([]) == 0
    out = capsys.readouterr().out
    assert out.count("not installed") == len(_report.DISTRIBUTIONS)
    assert "unavailable: ImportError: no torch here" in out
    assert "unavailable: ImportError: no ds_numa here" in out


def test_accelerators_are_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        type = "cuda"

    class Module:
        @staticmethod
        def get_device_name(index: int) -> str:
            return "NVIDIA H200"

    monkeypatch.setattr(torch.accelerator, "current_accelerator", Device)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert _report.collect()["accelerator"] == "8 x cuda (NVIDIA H200)"


def test_no_backend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    report = _report.collect()
    assert report["backends"] == []
    assert any(line.split() == ["backends", "none"] for line in _report.render(report).splitlines())


def test_runs_as_a_module() -> None:
    # Torch itself warns at import where numpy is missing.
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-m", "ds_train_utils"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("python ")


def test_bad_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _report.main(["--yaml"])
    assert stopped.value.code == 2
    assert "--yaml" in capsys.readouterr().err

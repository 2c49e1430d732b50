"""The command line: what it prints, and what it ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ds_fragment import __version__, commands

save_file = pytest.importorskip("safetensors.torch").save_file

NAME = "a.name.that.is.longer.than.a.terminal.is.wide" * 4


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    """A checkpoint, an equal one and another one."""
    paths = tuple(str(tmp_path / f"{name}.safetensors") for name in "abc")
    for path, value in zip(paths, (1.0, 1.0, 2.0), strict=True):
        save_file({NAME: torch.full((2, 3), value)}, path)
    return paths  # type: ignore[return-value]


@pytest.mark.parametrize("argv", [[], ["kernels"]])
def test_the_kernels_report(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(argv) == 0
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert printed["ds-fragment"] == __version__
    assert "library" in printed


def test_show(files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["show", files[0], "--norms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [NAME, "float32", "(2,", "3)", "24", f"{6**0.5:.9g}"]
    assert commands.main(["show", files[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["name"] == NAME


def test_show_on_a_terminal_has_whole_names(
    files: tuple[str, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    assert commands.main(["show", files[0]]) == 0
    printed = capsys.readouterr().out
    assert "─" in printed
    assert "…" not in printed
    column = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert column == NAME
    assert "all: 1 tensor, 6 elements, 24 bytes" in printed


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_diff_ends_with_what_it_found(
    files: tuple[str, str, str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    a, same, other = files
    assert commands.main(["diff", a, same, *options]) == 0
    capsys.readouterr()
    assert commands.main(["diff", a, other, *options]) == 1
    printed = capsys.readouterr().out
    assert NAME in printed
    if options:
        assert json.loads(printed)["found"][0]["where"] == [0, 0]


@pytest.mark.parametrize("argv", [["show", "absent"], ["diff", "absent", "absent"], ["diff", "a", "b", "--optimizer"]])
def test_errors_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("ds-fragment: path is '")


def test_a_damaged_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert commands.main(["show", str(tmp_path)]) == 2
    assert "is no complete safetensors file" in capsys.readouterr().err


def test_as_a_program(files: tuple[str, str, str]) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "ds_fragment", *argv], capture_output=True, text=True, check=False)

    found = run("diff", files[0], files[2])
    assert (found.returncode, found.stderr) == (1, "")
    assert "6 elements differ, the most at (0, 0) by 1.0 (1.0 in A, 2.0 in B)" in found.stdout
    assert run("no-command").returncode == 2

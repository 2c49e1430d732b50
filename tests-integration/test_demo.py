"""The demo, shortened: it must prove what it says, and leave what it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "docs" / "examples" / "train_moe.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("engine", ["flat", "fsdp2"])
def test_the_demo_proves_what_it_says(engine: str, tmp_path: Path) -> None:
    done = _run("--engine", engine, "--steps", "8", "--batch", "2", "--bytes", "3000", "--out", str(tmp_path))
    text = done.stderr
    assert done.returncode == 0, text
    assert text.count("as it must be") == 2, text  # the head set to zero, and the dense model from the file
    assert "WRONG" not in text
    losses = re.search(r"loss: ([\d.]+) -> ([\d.]+); the loader is in epoch (\d+)", text)
    assert losses is not None, text
    assert int(losses[3]) > 0, "it should have come to a second epoch"
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "model.safetensors", "partition.png"}
    for path in tmp_path.iterdir():
        assert str(path) in re.sub(r"\s*\n\s*", "", text) or path.name in text


def test_bad_options_are_refused_before_any_rank_starts(tmp_path: Path) -> None:
    done = _run("--steps", "2", "--out", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "--steps is 2, expected at least 4" in done.stderr
    assert not (tmp_path / "none").exists()

"""The guide of parallel layouts: its program runs, and prints what stands in it; so do its commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs/guides/groups.md").read_text(encoding="utf-8")
BLOCK = r"^```{}\n((?:(?!```).)*?)^```$"
COMMANDS = re.findall(BLOCK.format("sh") + r"\n\n" + BLOCK.format(""), GUIDE, re.MULTILINE | re.DOTALL)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_the_program_prints_what_the_guide_shows() -> None:
    blocks = re.findall(BLOCK.format("python"), GUIDE, re.MULTILINE | re.DOTALL)
    done = run(sys.executable, "-c", "\n".join(blocks))
    assert done.returncode == 0, done.stderr
    shown = re.findall(BLOCK.format("python") + r"\n\n" + BLOCK.format(""), GUIDE, re.MULTILINE | re.DOTALL)
    assert done.stdout == "".join(output for _, output in shown)
    assert len(shown) >= 4


@pytest.mark.parametrize(("command", "output"), COMMANDS, ids=[command.strip() for command, _ in COMMANDS])
def test_the_commands_print_what_the_guide_shows(command: str, output: str) -> None:
    python, *arguments = command.split()
    assert python == "python"
    done = run(sys.executable, *arguments)
    assert done.stdout + done.stderr == output


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 2

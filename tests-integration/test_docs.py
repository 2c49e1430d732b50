"""The documentation: its programs run, and it names everything that it must."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from left_out import LEFT_OUT

ROOT = Path(__file__).parents[1]
CONTRACTS = [
    json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "tests-integration/contract").glob("*.json")
]
NAMES: dict[str, set[str]] = {}  # by module, those of any DeepSpeed that are here
for contract in CONTRACTS:
    for module, names in contract["modules"].items():
        NAMES.setdefault(module, set()).update(name for name in names if f"{module}.{name}" not in LEFT_OUT)


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md", "docs/from-meta.md"])
def test_python_blocks_run(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_the_guide_of_logging_is_a_program(tmp_path: Path) -> None:
    text = (ROOT / "docs/guides/logging.md").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "hang explanation: 2 of 2 ranks answer" in done.stdout
    files = {f"{name}-{rank}.{end}" for rank in (0, 1) for name, end in (("bandwidth", "png"), ("operations", "jsonl"))}
    assert {path.name for path in (tmp_path / "logs").iterdir()} == files | {"0.jsonl", "1.jsonl", "trace.json"}
    lines = [json.loads(line) for line in (tmp_path / "logs" / "0.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["message"].partition(" ")[0] for line in lines] == [
        *("starting", "my", "the", "gradient", "communication", "group", "time"),
    ]
    assert (lines[3]["step"], lines[3]["norm"]) == (7, 1.25)


@pytest.mark.parametrize("module", sorted(NAMES))
def test_porting_guide_has_every_name(module: str) -> None:
    text = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    section = text.partition(f"\n### {module}\n")[2]
    section = re.split(r"\n###? ", section)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == NAMES[module]


def test_porting_guide_gives_the_reason_for_every_name_that_is_left_out() -> None:
    text = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    section = text.partition("\n## Left out\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == set(LEFT_OUT)


def test_porting_guide_has_the_versions_that_install_was_verified_on() -> None:
    from ds_train_utils._install import VERIFIED

    text = " ".join((ROOT / "docs" / "porting.md").read_text(encoding="utf-8").split())
    assert f"DeepSpeed {', '.join(VERIFIED[:-1])} and {VERIFIED[-1]}" in text
    rows = re.findall(r'Incumbent\("([0-9.]+)"', (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert tuple(dict.fromkeys(rows)) == VERIFIED

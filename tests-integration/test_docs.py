"""The documentation: its programs run, and it names everything that it must."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SURFACE = json.loads((Path(__file__).parent / "contract" / "deepspeed_surface.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_python_blocks_run(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("module", SURFACE["modules"])
def test_porting_guide_has_every_name(module: str) -> None:
    text = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    section = text.partition(f"\n### {module}\n")[2].partition("\n### ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == set(SURFACE["modules"][module])

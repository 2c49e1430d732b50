"""The guide to leaves is a program that prints what stands below its blocks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "leaves.md"
MARK = "-- end of block --"


def test_the_guide_prints_what_stands_below_its_programs(tmp_path: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    # A file, since detection reads the source of classes.
    program = "".join(f"{code}\nprint({MARK!r})\n" for code, _ in blocks)
    (tmp_path / "guide.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "guide.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(f"{MARK}\n")[:-1] == [printed for _, printed in blocks]

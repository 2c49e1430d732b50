"""The example of a weight sync runs as it stands, and its engine has every byte of the checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "weight_sync.py"


def test_the_engine_has_what_the_checkpoint_has() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    done = subprocess.run([sys.executable, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    syncs = re.findall(r"sync (\d), .*: (\d+) tensors, ([\d.]+) MB, .* all (\d+) are byte for byte", done.stdout)
    assert [sync[0] for sync in syncs] == ["1", "2"], done.stdout
    first, second = ((int(count), float(size), int(known)) for _, count, size, known in syncs)
    assert first[0] == first[2] == second[2]
    assert 0 < second[0] < first[0], "the embedding is frozen"
    assert second[1] < first[1]
    assert len(re.findall(r"gathered by .* ms", done.stdout)) == 2

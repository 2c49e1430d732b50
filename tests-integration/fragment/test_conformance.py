"""Every engine that ships, held to the table of `ds_fragment.testing`.

All 39 engines take a quarter of an hour: the everyday run tries a few, and all with ``CONFORMANCE=all``.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from ds_fragment.testing import CELLS, conduct, engines_of

HERE = Path(__file__).parent
ENGINES_FILE = HERE / "conformance_engines.py"
ENGINES = engines_of(ENGINES_FILE)
EVERYDAY = ("plain", "ddp", "fsdp2", "fsdp1 full_shard", "main_param")
CHOSEN = ENGINES if os.environ.get("CONFORMANCE") == "all" else EVERYDAY


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHOSEN)
def test_engine(name: str, tmp_path: Path) -> None:
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    table = conduct(ENGINES_FILE, name)
    (tmp_path / f"{name}.json").write_text(table.to_json())
    assert [record.cell for record in table] == list(CELLS)
    wrong = list(map(str, table.defects()))
    assert not wrong, f"{len(wrong)} cells are wrong:\n" + "\n".join(wrong)


def test_the_everyday_engines_are_there() -> None:
    assert set(EVERYDAY) <= set(ENGINES)

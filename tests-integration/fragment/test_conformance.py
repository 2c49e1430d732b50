"""Every engine that ships, held to the table of `ds_fragment.testing`, but for the cells that are listed as wrong.

All 39 engines take a quarter of an hour: the everyday run tries a few, and all with ``CONFORMANCE=all``.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from ds_fragment.testing import CELLS, conduct, engines_of

HERE = Path(__file__).parent
ENGINES_FILE = HERE / "conformance_engines.py"
ENGINES = engines_of(ENGINES_FILE)
EVERYDAY = ("plain", "ddp", "fsdp2", "fsdp1 full_shard", "main_param")
CHOSEN = ENGINES if os.environ.get("CONFORMANCE") == "all" else EVERYDAY
# By engine, the cells that are wrong: `python tools/conformance.py --defects` writes it anew.
KNOWN: dict[str, list[str]] = json.loads((HERE / "conformance_defects.json").read_text())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHOSEN)
def test_engine(name: str, tmp_path: Path) -> None:
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    table = conduct(ENGINES_FILE, name)
    (tmp_path / f"{name}.json").write_text(table.to_json())
    assert [record.cell for record in table] == list(CELLS)
    wrong = {str(record.cell): record for record in table.defects()}
    known = set(KNOWN.get(name, []))
    new = [str(record) for cell, record in wrong.items() if cell not in known]
    assert not new, f"{len(new)} cells are wrong that were not:\n" + "\n".join(new)
    mended = sorted(known - set(wrong))
    assert not mended, f"{len(mended)} cells are right now: take them out of conformance_defects.json: {mended}"


def test_defects_are_of_engines_and_cells_that_there_are() -> None:
    assert {*KNOWN, *EVERYDAY} <= set(ENGINES)
    assert {cell for cells in KNOWN.values() for cell in cells} <= set(map(str, CELLS))

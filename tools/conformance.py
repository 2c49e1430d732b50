"""Run the engine conformance kit on every engine that ships, and write docs/conformance.md from what comes out.

python tools/conformance.py                    # all engines: minutes
python tools/conformance.py ddp fsdp2          # some: prints, and writes no page
python tools/conformance.py --from FOLDER      # the page from tables that were saved with --save FOLDER
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import time
from pathlib import Path

from ds_fragment.testing import MOMENTS, Table, conduct, engines_of

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ROOT / "tests-integration" / "fragment" / "conformance_engines.py"
PAGE = ROOT / "docs" / "conformance.md"

_HEAD = """# Engine conformance of ds-fragment

Written by `python tools/conformance.py`; do not edit. {versions}.

Every engine is tried in {cells} cells: the value, the gradient and the optimizer state of its parameters, read and
written in every way that there is, at {moments} moments of training. What is right in each cell, and what has come
before each moment, is the docstring of `ds_fragment.testing._cells`. A new adapter is held to the same table:
`ds_fragment.testing.run_conformance`.

"""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", help="names of engines; all unless told")
    parser.add_argument("--save", type=Path, help="a folder for the tables as JSON")
    parser.add_argument("--from", dest="saved", type=Path, help="a folder of saved tables, in place of a run")
    options = parser.parse_args()
    known = engines_of(ENGINES)
    names = options.engines or list(known)
    tables: dict[str, Table] = {}
    for name in names:
        begin = time.monotonic()
        if options.saved is None:
            tables[name] = conduct(ENGINES, name)
        else:
            tables[name] = Table.from_json((options.saved / f"{name}.json").read_text())
        print(f"{name}: {tables[name].counts()}, {time.monotonic() - begin:.0f} s", flush=True)
        for record in tables[name].defects():
            print(f"  {record}", flush=True)
        if options.save is not None:
            options.save.mkdir(parents=True, exist_ok=True)
            (options.save / f"{name}.json").write_text(tables[name].to_json())
    if names == list(known):
        PAGE.write_text(page(tables))


def page(tables: dict[str, Table]) -> str:
    """The whole page."""
    everything = sum(tables.values(), Table())
    cells = len(everything) // max(1, len(tables))
    versions = ", ".join(
        [f"{name} {importlib.metadata.version(name)}" for name in ("ds-fragment", "torch", "deepspeed")]
        + [f"Python {platform.python_version()}", "gloo"]
    )
    head = _HEAD.format(versions=versions, cells=cells, moments=len(MOMENTS))
    return head + everything.to_markdown()


if __name__ == "__main__":
    main()

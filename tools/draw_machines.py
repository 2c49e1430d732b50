"""Write docs/machines.md: every machine in the tests of ds-numa, drawn with a plan for its ranks.

    python tools/draw_machines.py [--check]

``--check`` writes nothing and ends with 1 where the page is out of date.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MACHINES = ROOT / "packages" / "ds-numa" / "tests" / "machines"
PAGE = ROOT / "docs" / "machines.md"
HEAD = """# Machines

The machines that ds-numa is tested with: {count} real ones, from the public descriptions of hwloc, mpibind and
util-linux. Each is drawn with a plan for as many ranks as it has GPUs, or else for eight. A character is a core, its
digit the rank that has it; a space separates caches. `tools/draw_machines.py` writes this page.

A machine that is not here can be added: send what `ds-numa show --json` prints.
"""


def page() -> str:
    """The whole page."""
    from ds_numa import Topology, plan_binding

    paths = sorted(MACHINES.glob("*.json"))
    parts = [HEAD.format(count=len(paths))]
    for path in paths:
        machine = Topology.from_dict(json.loads(path.read_text(encoding="utf-8")))
        gpus = [gpu for gpu in machine.gpus if gpu.usable]
        cores = sum(not set(core).isdisjoint(machine.allowed) for core in machine.cores)
        plan = plan_binding(machine, min(len(gpus) or 8, cores))
        out = io.StringIO()
        machine.show(plan, file=out)
        parts.append(f"## {path.stem}\n\n```text\n{out.getvalue()}```\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` say whether it is what would be written."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date: run python tools/draw_machines.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

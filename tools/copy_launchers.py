"""Copy ds-logging's table of launchers to the distributions that hold a copy, or check that the copies are equal.

    python tools/copy_launchers.py [--check]

The distributions are independent of one another, so each has the file; this keeps them one table.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = Path("packages/ds-logging/src/ds_logging/_launchers.py")
COPIES: tuple[Path, ...] = (
    Path("packages/ds-groups/src/ds_groups/_launchers.py"),
    Path("packages/ds-numa/src/ds_numa/_launchers.py"),
)


def stale(root: Path = ROOT, copies: tuple[Path, ...] = COPIES) -> list[Path]:
    """Return the copies that are not equal to the source."""
    wanted = (root / SOURCE).read_bytes()
    return [copy for copy in copies if not (root / copy).is_file() or (root / copy).read_bytes() != wanted]


def main(arguments: list[str]) -> int:
    """Copy, or with ``--check`` name what is stale; 1 if anything is."""
    found = stale()
    for copy in found:
        if "--check" in arguments:
            print(f"{copy} differs from {SOURCE}; run python tools/copy_launchers.py")
        else:
            (ROOT / copy).write_bytes((ROOT / SOURCE).read_bytes())
    return int(bool(found) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

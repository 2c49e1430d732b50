"""The machine that ``--topology`` names: this one, a file, or a folder."""

from __future__ import annotations

import json
from pathlib import Path

from ds_numa.errors import NumaError, TopologyError
from ds_numa.topology import Topology


def read_described(path: Path | None) -> Topology:
    """This machine where nothing is named, what ``show --json`` wrote, or a folder with copies of /sys and /proc.

    Raises:
        TopologyError: it cannot be read, or describes no machine.
    """
    if path is None:
        return Topology.here()
    try:
        if path.is_dir():
            return Topology.from_sysfs(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except NumaError as error:
        raise TopologyError(f"--topology = '{path}': {error}") from None
    except (OSError, ValueError) as error:
        raise TopologyError(
            f"--topology = '{path}' cannot be read ({error}): write it with ds-numa show --json"
        ) from None
    if not isinstance(data, dict) or "nodes" not in data:
        found = f"the keys {', '.join(sorted(data))}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise TopologyError(
            f"--topology = '{path}' holds {found} and no nodes: it must be an object as ds-numa show --json writes it"
        )
    try:
        return Topology.from_dict(data)
    except NumaError as error:
        raise TopologyError(f"--topology = '{path}': {error}") from None

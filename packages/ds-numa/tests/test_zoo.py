"""Descriptions of real machines: most from the public test data of hwloc and mpibind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ds_numa import Topology

MACHINES = sorted((Path(__file__).parent / "machines").glob("*.json"))


def test_they_are_there() -> None:
    assert len(MACHINES) == 58


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_a_description_survives_reading_and_writing(path: Path) -> None:
    written = json.loads(path.read_text())
    machine = Topology.from_dict(written)
    assert machine.to_dict() == written
    assert Topology.from_dict(machine.to_dict()) == machine


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_caches_and_cores_lie_within_sockets(path: Path) -> None:
    machine = Topology.from_dict(json.loads(path.read_text()))
    for group in (*machine.cores, *machine.l3):
        assert not machine.sockets or any(set(group) <= set(socket) for socket in machine.sockets)

"""The engine conformance kit: one table of cells that every engine, and every new adapter, is held to.

    from ds_fragment.testing import Engine, Training, adam, net, run_conformance

    def build(seed):  # on every rank
        model = wrap(net(seed))
        return Training(model, adam(model.parameters()), data_index=rank, data_ranks=world_size)

    table = run_conformance(Engine("mine", build))  # every rank calls it
    assert not table.defects()

`conduct` runs the same on processes of its own, ends a cell that hangs, and goes on with the next one.
"""

from ds_fragment.testing._cells import CELLS, MOMENTS, OPERATIONS, QUANTITIES, Cell
from ds_fragment.testing._engine import Engine, Training
from ds_fragment.testing._launch import conduct, engines_of
from ds_fragment.testing._net import Net, adam, batch, net
from ds_fragment.testing._oracle import Oracle
from ds_fragment.testing._run import run_conformance
from ds_fragment.testing._table import Record, Table

__all__ = [
    "CELLS",
    "MOMENTS",
    "OPERATIONS",
    "QUANTITIES",
    "Cell",
    "Engine",
    "Net",
    "Oracle",
    "Record",
    "Table",
    "Training",
    "adam",
    "batch",
    "conduct",
    "engines_of",
    "net",
    "run_conformance",
]

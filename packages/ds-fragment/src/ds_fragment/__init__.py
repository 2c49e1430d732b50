"""Read and write the true fp32 weights, gradients and optimizer state of a sharded PyTorch run."""

from ds_fragment.__about__ import __version__
from ds_fragment._adapters import register_adapter
from ds_fragment._api import get_local, state_keys
from ds_fragment._attach import attach
from ds_fragment._read import iter_full
from ds_fragment._write import set_local, set_many, update_many
from ds_fragment.flat_partition import FlatPartition

__all__ = [
    "FlatPartition",
    "__version__",
    "attach",
    "get_local",
    "iter_full",
    "register_adapter",
    "set_local",
    "set_many",
    "state_keys",
    "update_many",
]

"""Read and write the true fp32 weights, gradients and optimizer state of a sharded PyTorch run."""

from ds_fragment.__about__ import __version__
from ds_fragment._adapters import register_adapter
from ds_fragment._api import get_local, state_keys
from ds_fragment._attach import attach
from ds_fragment._check import checked
from ds_fragment._checkpoint import load_full, save_full
from ds_fragment._describe import describe, plot_partition
from ds_fragment._kernels import use_kernels
from ds_fragment._read import iter_full
from ds_fragment._stats import available, count_nonfinite, norms
from ds_fragment._write import set_local, set_many, update_many
from ds_fragment.flat_partition import FlatPartition
from ds_fragment.mixed_precision_linkage import lazy_init_hp_params_optimizer_state, link_hp_params, unlink_hp_params

__all__ = [
    "FlatPartition",
    "__version__",
    "attach",
    "available",
    "checked",
    "count_nonfinite",
    "describe",
    "get_local",
    "iter_full",
    "lazy_init_hp_params_optimizer_state",
    "link_hp_params",
    "load_full",
    "norms",
    "plot_partition",
    "register_adapter",
    "save_full",
    "set_local",
    "set_many",
    "state_keys",
    "unlink_hp_params",
    "update_many",
    "use_kernels",
]

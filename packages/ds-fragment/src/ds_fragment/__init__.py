"""Read and write the true fp32 weights, gradients and optimizer state of a sharded PyTorch run."""

from ds_fragment import mixed_precision_linkage, module_utils, tensor_fragment, zero_checkpoint
from ds_fragment.__about__ import __version__
from ds_fragment._flight import synchronize
from ds_fragment.api.attach import attach
from ds_fragment.api.read import iter_full
from ds_fragment.api.shadow import Shadow
from ds_fragment.api.shards import map_shards
from ds_fragment.api.single import (
    get_full_hp_grad,
    get_full_hp_param,
    get_local,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
    set_full_hp_grad,
    set_full_hp_param,
    state_keys,
)
from ds_fragment.api.weights import WeightInfo, WeightSource
from ds_fragment.api.write import set_local, set_many, update_many
from ds_fragment.checkpoint.background import BackgroundSave
from ds_fragment.checkpoint.load import load_full
from ds_fragment.checkpoint.save import save_full
from ds_fragment.collective.check import checked
from ds_fragment.engines import Adapter, register_adapter
from ds_fragment.engines.fragment import fragment_address, get_hp_fragment_mapping, map_to_flat_opt_states
from ds_fragment.errors import (
    CheckpointError,
    EngineChangedError,
    FragmentError,
    GradientUnavailableError,
    InvalidValueError,
    RankMismatchError,
    StateKeyError,
    StateNotReadyError,
    UnlinkedParameterError,
    UnusedGradientError,
)
from ds_fragment.flat_partition import FlatPartition
from ds_fragment.kernels import use_kernels
from ds_fragment.layout import Fragment, Layout
from ds_fragment.mixed_precision_linkage import lazy_init_hp_params_optimizer_state, link_hp_params, unlink_hp_params
from ds_fragment.module_utils import ModulePathError, recursive_getattr, recursive_setattr
from ds_fragment.report.describe import describe, plot_partition
from ds_fragment.report.norms import available, count_nonfinite, norms, total_norm
from ds_fragment.sharding import Sharding

__all__ = [
    "Adapter",
    "BackgroundSave",
    "CheckpointError",
    "EngineChangedError",
    "FlatPartition",
    "Fragment",
    "FragmentError",
    "GradientUnavailableError",
    "InvalidValueError",
    "Layout",
    "ModulePathError",
    "RankMismatchError",
    "Shadow",
    "Sharding",
    "StateKeyError",
    "StateNotReadyError",
    "UnlinkedParameterError",
    "UnusedGradientError",
    "WeightInfo",
    "WeightSource",
    "__version__",
    "attach",
    "available",
    "checked",
    "count_nonfinite",
    "describe",
    "fragment_address",
    "get_full_hp_grad",
    "get_full_hp_param",
    "get_hp_fragment_mapping",
    "get_local",
    "iter_full",
    "lazy_init_hp_params_optimizer_state",
    "link_hp_params",
    "load_full",
    "map_shards",
    "map_to_flat_opt_states",
    "mixed_precision_linkage",
    "module_utils",
    "norms",
    "plot_partition",
    "recursive_getattr",
    "recursive_setattr",
    "register_adapter",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "save_full",
    "set_full_hp_grad",
    "set_full_hp_param",
    "set_local",
    "set_many",
    "state_keys",
    "synchronize",
    "tensor_fragment",
    "total_norm",
    "unlink_hp_params",
    "update_many",
    "use_kernels",
    "zero_checkpoint",
]


def __dir__() -> list[str]:
    """The public names and those with an underscore."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})

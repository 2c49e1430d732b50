"""What this package exports, and where each name comes from: the one list, read by `_lazy` on first use.

``__init__.pyi`` says the same to type checkers; a test compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # A frozen application holds the modules that import statements name, and `EXPORTS` holds strings.
    import ds_fragment
    import ds_groups
    import ds_loader
    import ds_logging
    import ds_numa
    import ds_ondevice
    import ds_z3leaf

    from ds_train_utils import (
        _install,
        comms_logging,
        dataloader,
        groups,
        init_on_device,
        logging,
        mixed_precision_linkage,
        module_utils,
        numa,
        nvtx,
        tensor_fragment,
        timer,
        z3_leaf_module,
        zero_to_fp32,
    )

__all__ = ["EXPORTS", "MODULES"]

MODULES = {
    "comms_logging": "ds_logging.comms_logging",
    "dataloader": "ds_loader.dataloader",
    "groups": "ds_groups.parallel_state",
    "init_on_device": "ds_ondevice.init_on_device",
    "logging": "ds_logging.logging",
    "mixed_precision_linkage": "ds_fragment.mixed_precision_linkage",
    "module_utils": "ds_fragment.module_utils",
    "numa": "ds_numa.numactl",
    "nvtx": "ds_logging.nvtx",
    "tensor_fragment": "ds_fragment.tensor_fragment",
    "timer": "ds_logging.timer",
    "z3_leaf_module": "ds_z3leaf.leaf",
    "zero_to_fp32": "ds_fragment.zero_checkpoint.zero_to_fp32",
}
"""Each submodule of this package, by name, and the module of the seven that it is."""

_NAMES = {
    "ds_train_utils.__about__": ("__version__",),
    "ds_train_utils._install": ("InstallError", "install"),
    # What `from deepspeed.utils import X` offers.
    "ds_logging.comms_logging": ("get_caller_func",),
    "ds_loader.dataloader": ("RepeatingLoader",),
    "ds_groups.parallel_state": (
        "destroy_groups",
        "get_data_parallel_group",
        "get_data_parallel_rank",
        "get_data_parallel_world_size",
        "get_model_parallel_group",
        "get_model_parallel_rank",
        "get_model_parallel_world_size",
        "get_tensor_model_parallel_group",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_src_rank",
        "get_tensor_model_parallel_world_size",
        "initialize",
        "set_tensor_model_parallel_rank",
        "set_tensor_model_parallel_world_size",
    ),
    "ds_ondevice.init_on_device": ("OnDevice",),
    "ds_logging.logging": ("log_dist", "log_dist_once", "logger", "set_log_level_from_string"),
    "ds_fragment.mixed_precision_linkage": ("lazy_init_hp_params_optimizer_state", "link_hp_params"),
    "ds_fragment.module_utils": ("recursive_getattr", "recursive_setattr"),
    "ds_numa.numactl": ("get_numactl_cmd",),
    "ds_logging.nvtx": ("instrument_w_nvtx",),
    "ds_fragment.tensor_fragment": (
        "fragment_address",
        "get_full_hp_grad",
        "get_full_hp_param",
        "get_hp_fragment_mapping",
        "map_to_flat_opt_states",
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
        "set_full_hp_grad",
        "set_full_hp_param",
        "tensor_fragment",
    ),
    "ds_z3leaf.leaf": (
        "get_z3_leaf_modules",
        "set_z3_leaf_module",
        "set_z3_leaf_modules",
        "set_z3_leaf_modules_by_name",
        "set_z3_leaf_modules_by_suffix",
        "unset_z3_leaf_modules",
        "z3_leaf_module",
        "z3_leaf_parameter",
    ),
    # What the seven offer besides.
    "ds_logging": ("CommsLogger", "RankFilter", "configure", "set_step", "warning_once"),
    "ds_groups": ("BoundTopology", "GroupOptions", "GroupsError", "ParallelTopology", "RankGrid"),
    "ds_ondevice": ("MaterializeError", "MaterializeReport", "is_deferred", "load_into", "materialize"),
    "ds_fragment": (
        "FlatPartition",
        "FragmentError",
        "attach",
        "available",
        "checked",
        "count_nonfinite",
        "describe",
        "get_local",
        "iter_full",
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
    ),
    "ds_z3leaf": ("LeafError", "find_leaf_candidates", "fully_shard_leaves", "mark_leaves"),
    "ds_loader": (
        "Coverage",
        "EmptyLoaderError",
        "LoaderStateError",
        "LoaderWarning",
        "OneShotLoaderError",
        "UnevenRanksError",
    ),
    "ds_numa": ("NumaError", "bind", "plan_binding"),
}

EXPORTS: dict[str, tuple[str, str | None]] = {
    **{name: (home, None) for name, home in MODULES.items()},
    **{name: (home, name) for home, names in _NAMES.items() for name in names},
}
"""By name: the module that it comes from, and its name there; None where it is the module itself."""

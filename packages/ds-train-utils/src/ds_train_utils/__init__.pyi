# `_exports.EXPORTS` for type checkers: the same names from the same places. A test compares the two.

from ds_fragment import (
    FlatPartition as FlatPartition,
    FragmentError as FragmentError,
    attach as attach,
    available as available,
    checked as checked,
    count_nonfinite as count_nonfinite,
    describe as describe,
    get_local as get_local,
    iter_full as iter_full,
    load_full as load_full,
    norms as norms,
    plot_partition as plot_partition,
    register_adapter as register_adapter,
    save_full as save_full,
    set_local as set_local,
    set_many as set_many,
    state_keys as state_keys,
    unlink_hp_params as unlink_hp_params,
    update_many as update_many,
    use_kernels as use_kernels,
)
from ds_fragment.mixed_precision_linkage import (
    lazy_init_hp_params_optimizer_state as lazy_init_hp_params_optimizer_state,
    link_hp_params as link_hp_params,
)
from ds_fragment.module_utils import recursive_getattr as recursive_getattr, recursive_setattr as recursive_setattr
from ds_fragment.tensor_fragment import (
    fragment_address as fragment_address,
    get_full_hp_grad as get_full_hp_grad,
    get_full_hp_param as get_full_hp_param,
    get_hp_fragment_mapping as get_hp_fragment_mapping,
    map_to_flat_opt_states as map_to_flat_opt_states,
    safe_get_full_fp32_param as safe_get_full_fp32_param,
    safe_get_full_grad as safe_get_full_grad,
    safe_get_full_optimizer_state as safe_get_full_optimizer_state,
    safe_get_local_fp32_param as safe_get_local_fp32_param,
    safe_get_local_grad as safe_get_local_grad,
    safe_get_local_optimizer_state as safe_get_local_optimizer_state,
    safe_set_full_fp32_param as safe_set_full_fp32_param,
    safe_set_full_grad as safe_set_full_grad,
    safe_set_full_optimizer_state as safe_set_full_optimizer_state,
    safe_set_local_fp32_param as safe_set_local_fp32_param,
    safe_set_local_grad as safe_set_local_grad,
    safe_set_local_optimizer_state as safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized as safe_update_full_grad_vectorized,
    set_full_hp_grad as set_full_hp_grad,
    set_full_hp_param as set_full_hp_param,
    tensor_fragment as tensor_fragment,
)
from ds_groups import (
    BoundTopology as BoundTopology,
    GroupOptions as GroupOptions,
    GroupsError as GroupsError,
    ParallelTopology as ParallelTopology,
    RankGrid as RankGrid,
)
from ds_groups.parallel_state import (
    destroy_groups as destroy_groups,
    get_data_parallel_group as get_data_parallel_group,
    get_data_parallel_rank as get_data_parallel_rank,
    get_data_parallel_world_size as get_data_parallel_world_size,
    get_model_parallel_group as get_model_parallel_group,
    get_model_parallel_rank as get_model_parallel_rank,
    get_model_parallel_world_size as get_model_parallel_world_size,
    get_tensor_model_parallel_group as get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank as get_tensor_model_parallel_rank,
    get_tensor_model_parallel_src_rank as get_tensor_model_parallel_src_rank,
    get_tensor_model_parallel_world_size as get_tensor_model_parallel_world_size,
    initialize as initialize,
    set_tensor_model_parallel_rank as set_tensor_model_parallel_rank,
    set_tensor_model_parallel_world_size as set_tensor_model_parallel_world_size,
)
from ds_loader import (
    Coverage as Coverage,
    EmptyLoaderError as EmptyLoaderError,
    LoaderStateError as LoaderStateError,
    LoaderWarning as LoaderWarning,
    OneShotLoaderError as OneShotLoaderError,
    UnevenRanksError as UnevenRanksError,
)
from ds_loader.dataloader import RepeatingLoader as RepeatingLoader
from ds_logging import (
    CommsLogger as CommsLogger,
    RankFilter as RankFilter,
    configure as configure,
    set_step as set_step,
    warning_once as warning_once,
)
from ds_logging.comms_logging import get_caller_func as get_caller_func
from ds_logging.logging import (
    log_dist as log_dist,
    log_dist_once as log_dist_once,
    logger as logger,
    set_log_level_from_string as set_log_level_from_string,
)
from ds_logging.nvtx import instrument_w_nvtx as instrument_w_nvtx
from ds_numa import NumaError as NumaError, bind as bind, plan_binding as plan_binding
from ds_numa.numactl import get_numactl_cmd as get_numactl_cmd
from ds_ondevice import (
    MaterializeError as MaterializeError,
    MaterializeReport as MaterializeReport,
    is_deferred as is_deferred,
    load_into as load_into,
    materialize as materialize,
)
from ds_ondevice.init_on_device import OnDevice as OnDevice
from ds_z3leaf import (
    LeafError as LeafError,
    find_leaf_candidates as find_leaf_candidates,
    fully_shard_leaves as fully_shard_leaves,
    mark_leaves as mark_leaves,
)
from ds_z3leaf.leaf import (
    get_z3_leaf_modules as get_z3_leaf_modules,
    set_z3_leaf_module as set_z3_leaf_module,
    set_z3_leaf_modules as set_z3_leaf_modules,
    set_z3_leaf_modules_by_name as set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix as set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules as unset_z3_leaf_modules,
    z3_leaf_module as z3_leaf_module,
    z3_leaf_parameter as z3_leaf_parameter,
)

from ds_train_utils.__about__ import __version__ as __version__
from ds_train_utils._install import InstallError as InstallError, install as install

from . import (
    comms_logging as comms_logging,
    dataloader as dataloader,
    groups as groups,
    init_on_device as init_on_device,
    logging as logging,
    mixed_precision_linkage as mixed_precision_linkage,
    module_utils as module_utils,
    numa as numa,
    nvtx as nvtx,
    timer as timer,
    zero_to_fp32 as zero_to_fp32,
)

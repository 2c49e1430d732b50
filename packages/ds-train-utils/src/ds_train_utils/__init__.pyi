# The one list of what this package exports. Type checkers read it, and `_lazy.py` reads it at run time: each line
# `from .place import name as name` makes `ds_train_utils.name` arrive from `ds_train_utils.place` on first use.

from . import (
    comms_logging as comms_logging,
    dataloader as dataloader,
    groups as groups,
    init_on_device as init_on_device,
    logging as logging,
    mixed_precision_linkage as mixed_precision_linkage,
    numa as numa,
    nvtx as nvtx,
)
from .__about__ import __version__ as __version__
from .comms_logging import get_caller_func as get_caller_func
from .dataloader import RepeatingLoader as RepeatingLoader
from .groups import (
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
from .init_on_device import OnDevice as OnDevice
from .logging import (
    log_dist as log_dist,
    log_dist_once as log_dist_once,
    logger as logger,
    set_log_level_from_string as set_log_level_from_string,
)
from .mixed_precision_linkage import (
    lazy_init_hp_params_optimizer_state as lazy_init_hp_params_optimizer_state,
    link_hp_params as link_hp_params,
)
from .numa import get_numactl_cmd as get_numactl_cmd
from .nvtx import instrument_w_nvtx as instrument_w_nvtx
from .tensor_fragment import (
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
from .z3_leaf_module import (
    get_z3_leaf_modules as get_z3_leaf_modules,
    set_z3_leaf_module as set_z3_leaf_module,
    set_z3_leaf_modules as set_z3_leaf_modules,
    set_z3_leaf_modules_by_name as set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix as set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules as unset_z3_leaf_modules,
    z3_leaf_module as z3_leaf_module,
    z3_leaf_parameter as z3_leaf_parameter,
)

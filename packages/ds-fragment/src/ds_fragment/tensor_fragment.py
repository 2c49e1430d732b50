"""Everything that `deepspeed.utils.tensor_fragment` offers, in one module of that name."""

from ds_fragment.api.single import (
    get_full_hp_grad,
    get_full_hp_param,
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
)
from ds_fragment.engines.fragment import (
    fragment_address,
    get_hp_fragment_mapping,
    map_to_flat_opt_states,
    tensor_fragment,
)
from ds_fragment.module_utils import recursive_getattr, recursive_setattr

__all__ = [
    "fragment_address",
    "get_full_hp_grad",
    "get_full_hp_param",
    "get_hp_fragment_mapping",
    "map_to_flat_opt_states",
    "recursive_getattr",
    "recursive_setattr",
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
]

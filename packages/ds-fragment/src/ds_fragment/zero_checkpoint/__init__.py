"""The folders that DeepSpeed's `save_checkpoint` writes, read without DeepSpeed."""

from ds_fragment.zero_checkpoint.consolidate import Summary, consolidate, iter_zero_checkpoint
from ds_fragment.zero_checkpoint.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    convert_zero_checkpoint_to_state_dict,
    get_checkpoint_files,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_model_state_files,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
    to_torch_tensor,
)

__all__ = [
    "Summary",
    "consolidate",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "get_checkpoint_files",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "iter_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "to_torch_tensor",
]

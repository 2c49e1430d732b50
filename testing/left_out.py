"""The names of ``deepspeed.utils`` that this project leaves out on purpose, each with the reason.

No other file of DeepSpeed takes any of them. Tests hold that each is really missing, and that nothing else is.
"""

LEFT_OUT = {
    "dataloader.RepeatingLoader.data_iter": "who advances the inner iterator makes the saved position wrong",
    "logging._log_dist_once_cached": "the lru_cache behind log_dist_once, which needs hashable arguments",
    "mixed_precision_linkage._init_lp_to_hp_mapping": "the first half of link_hp_params, never called alone",
    "nvtx._range_pop": "takes DeepSpeed's accelerator object; ranges are drawn by ds_logging's backends",
    "nvtx._range_push": "takes DeepSpeed's accelerator object; ranges are drawn by ds_logging's backends",
    "z3_leaf_module._do_set_z3_leaf_modules": "the loop behind set_z3_leaf_modules and unset_z3_leaf_modules",
    "z3_leaf_module._fully_qualified_class_name": "a formatter of class names for set_z3_leaf_modules",
}

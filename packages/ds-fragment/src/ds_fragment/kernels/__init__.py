"""Moving many ragged pieces at once: one launch for any number of them in CUDA, torch elsewhere."""

from ds_fragment.kernels.choice import usable, use_kernels
from ds_fragment.kernels.diagnosis import report, why_reference
from ds_fragment.kernels.errors import KernelError
from ds_fragment.kernels.fragments import Fragments
from ds_fragment.kernels.functions import copy, gather_grads, norm, publish
from ds_fragment.kernels.plan import all_plain
from ds_fragment.kernels.stats import Stats
from ds_fragment.kernels.stretches import ALIGN, Stretches, Tensors

__all__ = [
    "ALIGN",
    "Fragments",
    "KernelError",
    "Stats",
    "Stretches",
    "Tensors",
    "all_plain",
    "copy",
    "gather_grads",
    "norm",
    "publish",
    "report",
    "usable",
    "use_kernels",
    "why_reference",
]

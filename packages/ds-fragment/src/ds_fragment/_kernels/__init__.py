"""Moving many ragged pieces at once: one launch for any number of them in CUDA, torch elsewhere."""

from ds_fragment._kernels._choice import usable, use_kernels
from ds_fragment._kernels._fragments import Fragments
from ds_fragment._kernels._functions import copy, gather_grads, norm, publish
from ds_fragment._kernels._plan import all_plain
from ds_fragment._kernels._report import report, why_reference
from ds_fragment._kernels._stats import Stats
from ds_fragment._kernels._stretches import ALIGN, Stretches, Tensors
from ds_fragment._kernels.errors import KernelError

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

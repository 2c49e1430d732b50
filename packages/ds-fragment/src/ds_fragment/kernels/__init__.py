"""Move many ragged pieces at once: one launch for any number of them on a CUDA device, torch's operators elsewhere."""

from ds_fragment.kernels.choice import report, usable, use_kernels, why_reference
from ds_fragment.kernels.functions import copy, gather_grads, norm, publish
from ds_fragment.kernels.library import KernelError
from ds_fragment.kernels.reference import Stats

__all__ = [
    "KernelError",
    "Stats",
    "copy",
    "gather_grads",
    "norm",
    "publish",
    "report",
    "usable",
    "use_kernels",
    "why_reference",
]

"""Moving many ragged pieces at once: one call for any number of them."""

from ds_fragment._kernels._reference import copy

__all__ = ["copy"]

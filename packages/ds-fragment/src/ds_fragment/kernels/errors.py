"""What can go wrong with the kernels, as opposed to what they are given."""

from __future__ import annotations

from ds_fragment.errors import FragmentError

__all__ = ["KernelError"]


class KernelError(FragmentError, RuntimeError):
    """The CUDA kernels were asked for and cannot run, or a launch failed; the message says why."""

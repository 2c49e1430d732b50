"""What the fork server of `ranks` imports once, so that every rank starts with it: torch, where there is one."""

import contextlib

with contextlib.suppress(ImportError):
    import torch
    import torch.distributed  # noqa: F401

"""The collectives of `torch.distributed`, under the names that the installed torch does not warn about."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# Renamed in torch 2.13; the old names stay for a while.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

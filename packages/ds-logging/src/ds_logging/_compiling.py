"""Is this code being traced by torch.compile?"""

from __future__ import annotations

import sys
from typing import Any


def is_compiling() -> bool:
    """Say whether torch.compile traces the caller. Dynamo knows the answer while it traces, so it breaks no graph."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "compiler") and bool(torch.compiler.is_compiling())

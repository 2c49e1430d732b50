"""What moves the fragments on this machine, and why."""

from __future__ import annotations

import torch

from ds_fragment.kernels.choice import VARIABLE, chosen
from ds_fragment.kernels.library import loaded


def why_reference() -> str | None:
    """Why torch moves the fragments of CUDA tensors here; None if the kernels do."""
    if chosen() == "reference":
        return f"it was chosen ({VARIABLE} or use_kernels)"
    found = loaded()
    reason = found.why_no_device()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return found.why_not(torch.cuda.current_device())


def report() -> dict[str, str]:
    """The library, what it was compiled for, the driver, the devices, and what is in use; one line each."""
    found = loaded()
    reason = why_reference()
    lines = {"library": str(found.path) if found.library is not None else f"none: {found.reason}"}
    if found.library is not None:
        lines["architectures"] = found.architectures
        lines["compiled with"] = f"CUDA {found.toolkit}"
        lines["driver"] = f"runs CUDA up to {found.driver}" if found.driver else "none"
    lines["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for index in range(torch.cuda.device_count()):
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        state = found.why_not(index) or "ready"
        lines[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{capability}: {state}"
    lines["choice"] = chosen()
    lines["in use"] = "CUDA kernels" if reason is None else f"torch's own operators, because {reason}"
    return lines

"""What no function mode can see: ``torch.Tensor(3)``, ``torch.FloatTensor([1.0])`` and kin, and ``torch.range``."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ds_ondevice._factories import FactoryMode

_aten = torch.ops.aten


class LegacyMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Redirects what legacy constructors make, seen one level below as the operators that they call.

    A legacy constructor shows as ``aten.empty`` (sizes) or ``aten.lift_fresh`` (data) on the CPU while no torch
    function is running. ``torch.from_numpy`` shows as ``aten.lift_fresh`` too and must go on sharing memory with
    its array; the storage of such a tensor cannot be resized, which tells the two apart.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler at the first operator; nothing here is ever compiled

    def __init__(self, factory: FactoryMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._factory = factory
        factory.legacy = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._factory.depth or not self._factory.owns_device():
            return func(*args, **kwargs)
        if func is _aten.empty.memory_format and _is_cpu(kwargs.get("device")):
            # Through the public function: the modes of enclosing blocks see it, and see that it is settled.
            dtype = self._factory.dtype_for(kwargs.get("dtype") or torch.get_default_dtype())
            return torch.empty(args[0], dtype=dtype, device=self._factory.device)
        if func is _aten.range.step and _is_cpu(kwargs.get("device")):
            dtype = self._factory.dtype_for(kwargs.get("dtype") or torch.get_default_dtype())
            return func(*args, **{**kwargs, "dtype": dtype, "device": self._factory.device})
        made = func(*args, **kwargs)
        if func is _aten.lift_fresh.default and _is_cpu(made.device) and made.untyped_storage().resizable():
            return made.to(device=self._factory.device, dtype=self._factory.dtype_for(made.dtype))
        return made


def _is_cpu(device: torch.device | None) -> bool:
    return device is None or device.type == "cpu"


def is_in_legacy_mode() -> bool:
    """Whether this thread is inside a block that redirects legacy constructors."""
    return any(isinstance(mode, LegacyMode) for mode in _get_current_dispatch_mode_stack())

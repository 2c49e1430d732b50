"""See the initialisers of ``torch.nn.init`` that do nothing on meta.

Several of them (``trunc_normal_``, ``orthogonal_``, ...) draw until the values fit, or factorise, and so begin with
``if tensor.is_meta: return tensor``: no operator follows that could be recorded. That question itself passes through
the function mode, which is where the call is recorded instead, to be made as a whole on the real device.
"""

from __future__ import annotations

from types import FrameType, FunctionType
from typing import Any

import torch

from ds_ondevice._recording import active_recorder

_IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


def note_skipped(func: Any, args: tuple[Any, ...], caller: FrameType) -> None:
    """Record the initialiser that is running in frame ``caller`` if ``func(*args)`` is its question for ``is_meta``."""
    if func != _IS_META or caller.f_globals.get("__name__") != "torch.nn.init" or not args[0].is_meta:
        return
    initializer = getattr(torch.nn.init, caller.f_code.co_name, None)
    recorder = active_recorder()
    if recorder is None or not isinstance(initializer, FunctionType) or initializer.__code__ is not caller.f_code:
        return
    code = caller.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    recorder.record_call(initializer, {name: caller.f_locals[name] for name in names}, args[0])

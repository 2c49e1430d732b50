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
    if func != _IS_META or caller.f_globals is not vars(torch.nn.init) or not args[0].is_meta:
        return
    recorder, code = active_recorder(), caller.f_code
    if recorder is None or code.co_freevars:
        return
    # Made anew of its code: under its name in torch.nn.init may stand a function that somebody wrapped around it.
    initializer = FunctionType(code, caller.f_globals, code.co_name)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    recorder.record_call(initializer, {name: caller.f_locals[name] for name in names}, args[0])

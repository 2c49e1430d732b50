"""What a recorded tensor answers when it is asked where it is.

[Note: claims] Code that builds a model asks whether it is on meta, and then takes another path: it skips its
initialisation, or makes a table elsewhere. What is recorded should be the path that it takes without meta. So inside a
block on meta, recorded tensors claim to be on the CPU: ``tensor.device``, ``is_meta``, ``is_cpu`` and ``get_device()``
answer so to whoever runs below the block.

Three askers get the truth. The body of the block itself (or of the decorated function), which opened it and knows. And
torch, whose own code must treat a tensor on meta as one: `Module.to`, FSDP2, the initialisers. And a class of tensors
that wraps others, in its ``__new__``, since it has to be where they are.

The device that is claimed is one object, `CLAIMED`. Given to a function of torch as its device, by position or by name,
it means the block's device again: ``torch.arange(n, device=self.weight.device)`` is recorded like ``torch.arange(n)``.
A device that was spelled out, as ``"cpu"``, is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

from ds_ondevice._ops import is_recorded

CLAIMED = torch.device("cpu")

_Tensor: Any = torch.Tensor
ANSWERS: dict[Any, Callable[[], object]] = {
    _Tensor.device.__get__: lambda: CLAIMED,
    _Tensor.is_meta.__get__: lambda: False,
    _Tensor.is_cpu.__get__: lambda: True,
    _Tensor.get_device: lambda: -1,
}


class Body:
    """The code between the beginning and the end of a block.

    Args:
        frame: the frame that opened it; for a decorated function, the one that calls the function.
        called: whether the body is what that frame calls.
    """

    def __init__(self, frame: FrameType, *, called: bool) -> None:
        self._frame, self._called = frame, called
        self._nested = _nested(frame.f_code)

    def runs(self, frame: FrameType) -> bool:
        """Whether a frame is of the body, or of a lambda or comprehension that stands in it."""
        if not self._called:
            return frame is self._frame or frame.f_code in self._nested
        caller = frame.f_back
        if caller is not None and frame.f_code.co_name.startswith("<"):
            return self.runs(caller)
        return caller is self._frame


def _nested(code: CodeType) -> set[CodeType]:
    inner = {part for part in code.co_consts if isinstance(part, CodeType) and part.co_name.startswith("<")}
    return inner.union(*map(_nested, inner)) if inner else inner


def answer(func: Any, args: tuple[Any, ...], body: Body, asker: FrameType) -> object:
    """What a recorded tensor answers to a question for its place; None if the truth is to be told.

    Args:
        func: what was asked, one of `ANSWERS`, such as the getter of ``Tensor.device``.
        args: whom.
        body: of the block on meta.
        asker: the frame that asks.
    """
    if not is_recorded(args[0]):
        return None
    if body.runs(asker) or str(asker.f_globals.get("__name__")).partition(".")[0] in ("torch", "ds_ondevice"):
        return None
    if asker.f_code.co_name == "__new__" and _makes_tensor(asker):
        return None
    return ANSWERS[func]()


def _makes_tensor(frame: FrameType) -> bool:
    """Whether it is ``__new__`` of a class of tensors that wraps others: it must be where these are."""
    first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_varnames else None
    return isinstance(first, type) and issubclass(first, torch.Tensor)

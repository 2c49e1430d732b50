"""Records which modules a model enters and leaves, as events ([Note: events] in ``_rehearse/calls.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_z3leaf._rehearse.index import ModuleIndex


class Recorder:
    """Writes an event whenever a module with parameters is entered or left.

    Its hooks run before those that the modules have already, such as an engine's, so that the module which an engine
    gathers for is on record when the engine waits. A module that raises is left, too.

    Args:
        index: the model's modules.
        write: called with each event, on the thread that runs the model.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.GELU())
    >>> import torch
    >>> events = []
    >>> with Recorder(ModuleIndex(model), events.append):
    ...     _ = model(nn.Parameter(torch.zeros(1, 1)))
    >>> events  # the model, its linear layer, both left
    [0, 1, -2, -1]
    """

    def __init__(self, index: ModuleIndex, write: Callable[[int], Any]) -> None:
        self.index = index
        self._write = write
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for number, module in enumerate(self.index.modules):
            if not self.index.holds[number]:
                continue
            self._handles.append(module.register_forward_pre_hook(self._entering(number), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving(number), always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, number: int) -> Callable[..., None]:
        write = self._write

        def enter(module: nn.Module, args: Any) -> None:
            write(number)

        return enter

    def _leaving(self, number: int) -> Callable[..., None]:
        write = self._write

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            write(~number)

        return leave

"""The modules that are built inside a block on meta, and what is kept of them after it.

[Note: after the block] Nothing is recorded after the block, so whatever happens to recorded tensors then must be
noticed. A write in place raises the version that a tensor counts, but not one through ``tensor.data``, which counts
for itself. So parameters and buffers become `GuardedParameter` and `GuardedTensor` at the end of the block, whose
``.data`` notes writes; `materialize` makes plain ones of them again.

``fully_shard`` after the block puts DTensors on meta in the place of recorded parameters. `Origin` remembers what those
were.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import _disable_current_modes

from ds_ondevice._ops import Mark, Recording, View, is_recorded, leaves, mapped, mark_of, view_of
from ds_ondevice._recording import active_recorder
from ds_ondevice._replay import value_of

_DATA: Any = torch.Tensor.data
_NEW_PARAMETER = torch.nn.Parameter.__new__.__code__


class _Alias(torch.Tensor):
    """What ``.data`` of a guarded tensor is: writes to it, or to views of it, are noted on the storage."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            given = [leaf for leaf in leaves((args, kwargs or {})) if isinstance(leaf, cls)]
            versions = [alias._version for alias in given]
            made = func(*args, **(kwargs or {}))
            for alias, version in zip(given, versions, strict=True):
                mark = mark_of(alias) if alias.is_meta else None
                if mark is not None and alias._version > version:
                    mark.written_outside = True
            return _as_aliases(made)


def _as_aliases(made: Any) -> Any:
    """A result, with the views among its tensors as aliases, too."""
    if isinstance(made, (list, tuple)):
        return type(made)(map(_as_aliases, made))
    if type(made) is not torch.Tensor or not made.is_meta or not is_recorded(made):
        return made
    return made.as_subclass(_Alias)


class _Guard:
    """The ``data`` of a recorded tensor after the block."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; for dispatch modes of others, which know no class but torch's, on plain tensors."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            foreign = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack()
            if foreign and active_recorder() is None:
                with _disable_current_modes():
                    args, kwargs = mapped(_plain_leaf, args), mapped(_plain_leaf, kwargs)
            return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """``Tensor.data``, with writes noted."""
        made: torch.Tensor = _DATA.__get__(self)
        if active_recorder() is not None or not is_recorded(made):
            return made
        return made.as_subclass(_Alias)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _DATA.__set__(self, value)

    def detach(self) -> torch.Tensor:
        """``Tensor.detach``. `torch.nn.Parameter` makes itself of this, and wants the class to stay."""
        tensor: Any = self
        made = torch.Tensor.detach(tensor)
        if sys._getframe(1).f_code is _NEW_PARAMETER:
            made.__class__ = type(tensor)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        tensor: Any = self
        if id(tensor) not in memo:
            unguarded = plain(tensor)
            memo.setdefault(id(memo), []).append(unguarded)  # it stays alive: the memo goes by ids
            memo[id(tensor)] = unguarded.__deepcopy__(memo)  # type: ignore[no-untyped-call]
            vars(memo[id(tensor)]).update(copy.deepcopy(vars(tensor), memo))
        return memo[id(tensor)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor: Any = self
        return plain(tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class GuardedParameter(_Guard, torch.nn.Parameter):
    """A recorded parameter after its block. What is made by calling its class is a plain parameter."""

    def __del__(self) -> None:
        """Note writes for those who remember the storage: the version is known as long as the tensor lives."""
        mark = mark_of(self) if self.is_meta else None
        if mark is not None and not mark.explains(self._version):
            mark.written_outside = True

    def __new__(cls, data: torch.Tensor | None = None, requires_grad: bool = True) -> Any:
        """A plain parameter."""
        given: Any = data if data is None else plain(data)
        return torch.nn.Parameter(given, requires_grad)


class GuardedTensor(_Guard, torch.Tensor):
    """A recorded buffer after its block."""


def _plain_leaf(leaf: Any) -> Any:
    return plain(leaf) if isinstance(leaf, torch.Tensor) else leaf


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, as what it was without a guard."""
    if isinstance(tensor, GuardedParameter):
        return torch.Tensor._make_subclass(torch.nn.Parameter, tensor.detach(), tensor.requires_grad)
    return tensor.as_subclass(torch.Tensor) if type(tensor) in (GuardedTensor, _Alias) else tensor


def plain_type(tensor: torch.Tensor) -> type[torch.Tensor]:
    """The class of a tensor, without a guard."""
    if type(tensor) not in (GuardedParameter, GuardedTensor, _Alias):
        return type(tensor)
    return torch.nn.Parameter if isinstance(tensor, torch.nn.Parameter) else torch.Tensor


@dataclass(frozen=True)
class Origin:
    """What a parameter was when its block ended."""

    view: View
    mark: Mark


ORIGINS: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Origin]] = weakref.WeakKeyDictionary()
"""By module and name, the recorded parameters of modules that have not been materialized."""


class Construction:
    """Notices the modules that this thread builds while it is entered.

    Args:
        recording: where they are noted.
        include_buffers: False computes the value of a buffer when it is registered.
    """

    def __init__(self, recording: Recording, *, include_buffers: bool) -> None:
        self._recording, self._include_buffers = recording, include_buffers
        self._thread = threading.get_ident()
        self._modules: dict[int, torch.nn.Module] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        on_buffer: Any = self._note if self._include_buffers else self._compute
        self._hooks = [
            register_module_parameter_registration_hook(self._note),
            register_module_module_registration_hook(self._note_both),
            register_module_buffer_registration_hook(on_buffer),
        ]

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._modules.values():
            self._recording.modules.append(weakref.ref(module))
            self._leave(module)
        self._modules.clear()

    def _note(self, module: torch.nn.Module, name: str, held: object) -> None:
        if threading.get_ident() == self._thread:
            self._modules[id(module)] = module

    def _note_both(self, module: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
        if threading.get_ident() == self._thread:
            self._modules[id(module)] = module
            if child is not None:
                self._modules[id(child)] = child

    def _compute(self, module: torch.nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
        self._note(module, name, buffer)
        if threading.get_ident() != self._thread or buffer is None or not is_recorded(buffer):
            return None
        return value_of(buffer).clone()

    def _leave(self, module: torch.nn.Module) -> None:
        origins = {}
        for name, tensor in _held(module):
            if type(tensor) is torch.nn.Parameter:
                tensor.__class__ = GuardedParameter
            elif type(tensor) is torch.Tensor:
                tensor.__class__ = GuardedTensor
            mark = mark_of(tensor)
            if mark is not None and isinstance(tensor, torch.nn.Parameter):
                origins[name] = Origin(view_of(tensor, mark.key), mark)
        if origins:
            ORIGINS[module] = origins


def _held(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The recorded parameters and buffers of a module itself."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and not torch.nn.parameter.is_lazy(tensor) and is_recorded(tensor):
            yield name, tensor

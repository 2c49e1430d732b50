"""Let a model run without leaving a trace: stand-ins for its parameters and buffers, and everything else put back.

A forward may write buffers, attributes and gradients, and draw random numbers. Here it does so on stand-ins: parameters
that share the model's values (or have none, on meta) and copies of the buffers. The random streams are put back.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._sizes import full_shape


class WatchedParameters(dict[str, Any]):
    """A module's ``_parameters`` that says when one of them is read by name, as ``module.weight`` does."""

    def __init__(self, entries: dict[str, Any], read: Callable[[], None]) -> None:
        super().__init__(entries)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        self._read()
        return super().__getitem__(name)


@contextmanager
def stand_in(index: ModuleIndex, read: Callable[[int], None], *, meta: bool) -> Iterator[None]:
    """Give the model stand-ins for its parameters and buffers; at the end, put back all that the modules had.

    Attributes, entries of their lists, sets and dictionaries, and hooks that the modules are given meanwhile go, and
    those that are replaced come back. What a module changes inside other objects stays changed.

    Args:
        index: the model's modules.
        read: called with the number of a module whenever one of its parameters is read by name.
        meta: give them tensors on meta of the full shapes, also for what ZeRO-3 has partitioned.
    """
    made: dict[int, Any] = {}  # by id: one stand-in for a tensor that has two names

    def of(tensor: Any, make: Callable[[Any], Any]) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor)
        return made[id(tensor)]

    def parameter(param: Any) -> Any:
        values = (
            torch.empty(full_shape(param), dtype=param.dtype, device="meta")
            if meta and not param.is_meta
            else param.detach()
        )
        return nn.Parameter(values, requires_grad=param.requires_grad)

    def buffer(tensor: Any) -> Any:
        return torch.empty_like(tensor, device="meta") if meta else tensor.clone()

    saved = [_Attributes(module) for module in index.modules]
    grads = [
        (param, param.grad) for module in index.modules for param in module._parameters.values() if param is not None
    ]
    try:
        for number, module in enumerate(index.modules):
            entries = {name: of(param, parameter) for name, param in module._parameters.items()}
            reader = _reader(read, number)
            module._parameters = WatchedParameters(entries, reader)
            module._buffers = {name: of(tensor, buffer) for name, tensor in module._buffers.items()}
        yield
    finally:
        for attributes in saved:
            attributes.put_back()
        for param, grad in grads:  # modules such as LSTM keep references of their own to the parameters
            if param.grad is not grad:
                param.grad = grad


class _Attributes:
    """The attributes of a module, and the entries of those that are containers: hooks, caches, lists of losses."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = dict(module.__dict__)
        self._entries = [
            (value, value.copy()) if value else (value, ())
            for value in self._values.values()
            if type(value) in (dict, OrderedDict, list, set)
        ]

    def put_back(self) -> None:
        self._module.__dict__.clear()
        self._module.__dict__.update(self._values)
        for value, entries in self._entries:
            if value or entries:
                value.clear()
                value.extend(entries) if isinstance(value, list) else value.update(entries)


def _reader(read: Callable[[int], None], number: int) -> Callable[[], None]:
    return lambda: read(number)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the random streams of torch, Python and numpy back."""
    states = random_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    numpy = sys.modules.get("numpy")
    array = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(array)


def random_state() -> tuple[Any, Any]:
    """Where the random streams of the host stand: torch's and Python's."""
    return torch.get_rng_state(), random.getstate()


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Train mode for a model in eval mode; one that is in train mode keeps the modes of all its modules."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if not model.training:
            model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""Let a model run without leaving a trace: stand-ins for its parameters and buffers, and everything else put back.

A forward may write buffers, attributes and gradients, and draw random numbers. Here it does so on stand-ins: parameters
that share the model's values (or have none, on meta) and copies of the buffers. A forward that writes parameters in
place, as one that clamps its weights does, writes the model's values: these are copied before the first write and put
back. The random streams are put back.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._sizes import full_shape

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


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
    those that are replaced come back; tensors that are written in place get their values back. What a module changes
    inside other objects, a list in a list among them, stays changed.

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
    tensors = [
        value
        for module in index.modules
        for value in (*module._parameters.values(), *module.__dict__.values())
        if isinstance(value, torch.Tensor)
    ]
    grads = [
        (param, param.grad) for module in index.modules for param in module._parameters.values() if param is not None
    ]
    try:
        for number, module in enumerate(index.modules):
            entries = {name: of(param, parameter) for name, param in module._parameters.items()}
            reader = _reader(read, number)
            module._parameters = WatchedParameters(entries, reader)
            module._buffers = {name: of(tensor, buffer) for name, tensor in module._buffers.items()}
        with _KeptValues(tensors):
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
            if type(value) in _CONTAINERS
        ]

    def put_back(self) -> None:
        self._module.__dict__.clear()
        self._module.__dict__.update(self._values)
        for value, entries in self._entries:
            if value or entries:
                value.clear()
                value.extend(entries) if isinstance(value, (list, deque)) else value.update(entries)


class _KeptValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies the storage of a tensor before the first write to it, and puts all of them back at the end."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [storage for tensor in tensors if (storage := _storage_of(tensor)) is not None]
        self._storages = {storage._cdata: storage for storage in storages}
        self._copies: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # an operator of higher order has none
        if schema is not None and schema.is_mutable:
            for place, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[place] if place < len(args) else kwargs.get(argument.name)
                    for tensor in value if isinstance(value, (tuple, list)) else (value,):
                        self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        storage = _storage_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if storage is not None and storage._cdata in self._storages and storage._cdata not in self._copies:
            self._copies[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for key, values in self._copies.items():
            if self._storages[key].nbytes() != values.nbytes():
                self._storages[key].resize_(values.nbytes())
            self._storages[key].copy_(values)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """None for a tensor that has no values, and for one that has no storage of its own: sparse, or around others."""
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return None if storage.device.type == "meta" else storage


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
    training = model.training
    modes = [(module, module.training) for module in model.modules()]
    try:
        if not training:
            model.train()
        yield
    finally:
        if not training:
            model.eval()  # some modules merge weights in it and take them apart in train()
        for module, mode in modes:
            module.training = mode

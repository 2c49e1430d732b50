"""Batches copied to a device one ahead, on a stream of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class DeviceCopier:
    """Copies batches to one device; it lives as long as the loader, so that there is one stream for all epochs.

    Host tensors go through pinned memory, which torch's allocator keeps and reuses. A copied tensor belongs to the side
    stream; ``record_stream`` keeps its memory until the consumer's stream has used it.

    Args:
        device: where to. One without streams of its own, such as ``cpu``, is copied to at once.
    """

    def __init__(self, device: torch.device) -> None:
        if device.index is None and device.type not in ("cpu", "meta", "mps"):
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        self.device = device
        module: Any = torch.get_device_module(device) if device.type not in ("cpu", "meta") else None
        self._module: Any = module if hasattr(module, "Stream") and hasattr(module, "stream") else None
        self._stream: Any = None if self._module is None else self._module.Stream(device)

    def copy(self, batch: Any) -> Any:
        """Copy a batch at once."""
        return self.finish(*self.begin(batch))

    def begin(self, batch: Any) -> tuple[Any, Any]:
        """Start copying a batch; give both results to `finish`."""
        if self._stream is None:
            return apply(self._move, batch), None
        with self._module.stream(self._stream):
            moved = apply(self._move, batch)
            done = self._module.Event()
            done.record(self._stream)
        return moved, done

    def finish(self, moved: Any, done: Any) -> Any:
        """Let the consumer's current stream wait for the copy."""
        if done is None:
            return moved
        current = self._module.current_stream(self.device)
        current.wait_event(done)
        apply(lambda value: self._record(value, current), moved)
        return moved

    def _move(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu" and self._stream is not None and not value.is_pinned():
                value = value.pin_memory()
            return value.to(self.device, non_blocking=True)
        move = getattr(value, "to", None)  # such as transformers' BatchEncoding
        if not callable(move):
            return value
        try:
            return move(self.device, non_blocking=True)
        except TypeError:
            return move(self.device)

    def _record(self, value: Any, stream: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device == self.device:
            value.record_stream(stream)
        elif callable(getattr(value, "to", None)) and not isinstance(value, torch.Tensor):
            for tensor in _tensors_of(value):
                tensor.record_stream(stream)
        return value


def apply(function: Callable[[Any], Any], batch: Any) -> Any:
    """Call a function on the tensors, and on objects with ``.to``, in containers of any depth."""
    if isinstance(batch, torch.Tensor) or callable(getattr(batch, "to", None)):
        return function(batch)
    if isinstance(batch, Mapping) and type(batch) not in (dict, OrderedDict, defaultdict):
        return type(batch)({key: apply(function, value) for key, value in batch.items()})  # type: ignore[call-arg]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed: Any = copy.copy(batch)
        for entry in dataclasses.fields(batch):
            object.__setattr__(changed, entry.name, apply(function, getattr(batch, entry.name)))
        return changed
    leaves, spec = tree_flatten(batch)
    if len(leaves) == 1 and leaves[0] is batch:
        return batch
    return tree_unflatten([apply(function, leaf) for leaf in leaves], spec)


class OneAhead(Iterator[Any]):
    """Fetches a batch and starts its copy before the batch before it is handed out.

    An exception of the loader, and its end, come when their turn has come.

    Args:
        iterator: of the loader.
        copier: for the device.
        state: the loader's own state; asked for before each fetch, so that it fits the batch handed out last.
    """

    def __init__(self, iterator: Iterator[Any], copier: DeviceCopier, state: Callable[[], Any]) -> None:
        self._iterator = iterator
        self._copier = copier
        self._state = state
        self._next: tuple[Any, Any] | None = None
        self._error: BaseException | None = None
        self.state: Any = None
        self._begun = False

    def __next__(self) -> Any:
        if not self._begun:
            self._begun = True
            self._fetch()
        if self._error is not None:
            error, self._error, self._begun = self._error, None, False
            try:
                raise error
            finally:
                # Its traceback holds this frame, and frames with a batch and an event: in a cycle they would live until
                # the garbage collector comes by; and in a worker process it may not destroy an event.
                del error
        assert self._next is not None
        moved, done = self._next
        self._next = None
        self._fetch()
        return self._copier.finish(moved, done)

    def _fetch(self) -> None:
        self.state = self._state()
        try:
            self._next = self._copier.begin(next(self._iterator))
        except StopIteration as error:
            self._error = error.with_traceback(None)  # it holds the frame of __next__, and with it the batch
        except Exception as error:
            self._error = error


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that an object with ``.to`` holds, where they can be found: in its items or its attributes."""
    items = value.values() if callable(getattr(value, "values", None)) else getattr(value, "__dict__", {}).values()
    for item in items:
        if isinstance(item, torch.Tensor):
            if item.is_cuda:
                yield item
        elif isinstance(item, dict):
            yield from (inner for inner in item.values() if isinstance(inner, torch.Tensor) and inner.is_cuda)

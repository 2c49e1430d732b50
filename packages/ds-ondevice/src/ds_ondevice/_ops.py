"""What is recorded: operators, the tensors that they use, and the marks on the storages of these.

[Note: recording] A tensor on meta has a shape but no memory. It still has a storage object, and every tensor that
shares memory (a view, ``p.data``, the ``Parameter`` made from it) shares that object. So a tensor is described by a
`View`: the key of its storage, and where in it the tensor lies. Operators that only make views need no recording;
those that make a new storage or write into one do. The list of them, a `Recording`, hangs on the storages that it
describes (as an attribute: PyTorch keeps a storage's Python object as long as the storage) and dies with the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_ondevice._random import Draw

_MARK = "_ds_ondevice_mark"


@dataclass(slots=True)
class View:
    """A strided tensor in a recorded storage.

    ``key`` is the storage; ``size`` and ``stride``, one number a dimension, and ``offset`` count elements.
    """

    key: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def extent(self) -> int:
        """How many elements the storage needs to have."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return max(self.offset + 1 + last, 0)


@dataclass(eq=False, slots=True)
class Given:
    """A real tensor that went into a recorded operator, and its version then."""

    tensor: torch.Tensor
    version: int

    def changed(self) -> bool:
        """Whether the tensor was written to since."""
        return version_of(self.tensor) != self.version


@dataclass(eq=False, slots=True)
class Blank:
    """A real tensor of which only dtype and shape matter."""

    dtype: torch.dtype
    size: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Op:
    """One recorded call.

    Attributes:
        order: its place among all that is recorded.
        func: an operator, or a Python function that writes to its arguments.
        args: its arguments, with tensors replaced by View and Given.
        kwargs: the same.
        outputs: one for each tensor of the result; None where that is not on meta.
        creates: the storages that it makes.
        writes: the storages that it writes to, one for each tensor written to.
        reads: the storages that it uses, those that it writes to among them.
        givens: the real tensors that it uses.
        draws: where its random numbers come from; empty if it draws none.
        obstacle: why the call cannot be repeated, if it cannot.
        unwritten: whether its result has no value until something writes to it.
        fills: whether it writes to all of what it writes to, whatever was there.
        drawn_on: "cpu" or another type of device, if it really drew numbers there. On such a device it draws them once
            more, and they are thrown away: what is drawn after them depends on that.
    """

    order: int
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[View | None, ...] = ()
    creates: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    givens: tuple[Given, ...] = ()
    draws: tuple[Draw, ...] = ()
    obstacle: str = ""
    unwritten: bool = False
    fills: bool = False
    drawn_on: str = ""

    @property
    def name(self) -> str:
        """How an error calls it."""
        return str(self.func) if isinstance(self.func, torch._ops.OpOverload) else str(self.func.__qualname__)

    @property
    def is_source(self) -> bool:
        """Whether it depends on nothing, so that it can run at any time."""
        return not (self.draws or self.reads)


def leaves(value: Any) -> Iterator[Any]:
    """What an argument or a result consists of: itself, or the elements of lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The argument with every one of its `leaves` replaced."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([item if type(item) is int else mapped(function, item) for item in value])
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    return function(value)


@dataclass(eq=False)
class Recording:
    """What happened in one outermost ``OnDevice`` block on meta.

    Attributes:
        ops: the operators.
        parents: earlier recordings whose storages they used.
        made: what they returned; `materialize` looks there for tensors that no module holds.
        modules: what was built.
    """

    ops: list[Op] = field(default_factory=list)
    parents: list[Recording] = field(default_factory=list)
    made: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    modules: list[weakref.ref[torch.nn.Module]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Mark:
    """What hangs on a recorded storage.

    ``key`` names it, ``recordings`` are those that made or changed it, and ``writes`` counts the writes seen: a tensor
    whose version is higher was written to elsewhere. A tensor that was given this storage by ``tensor.data = other``
    keeps counting from the version that it had: ``ahead`` is by how much it was ahead then. ``written_outside`` says
    that it was written to through ``tensor.data`` after its block.
    """

    key: int
    recordings: list[Recording]
    writes: int = 0
    ahead: int = 0
    written_outside: bool = False

    def explains(self, version: int) -> bool:
        """Whether a tensor of this version was written to by nobody but those whose writes were seen."""
        return version <= self.writes + self.ahead and not self.written_outside


def mark_of(tensor: torch.Tensor) -> Mark | None:
    """The mark on the storage of a strided tensor, if it was recorded."""
    return getattr(tensor.untyped_storage(), _MARK, None)


def mark_as(tensor: torch.Tensor, mark: Mark) -> None:
    """Let a tensor on meta stand for the storage that ``mark`` describes."""
    setattr(tensor.untyped_storage(), _MARK, mark)


def is_recorded(leaf: Any) -> bool:
    """Whether it is a strided tensor on meta that was recorded."""
    return on_meta(leaf) and mark_of(leaf) is not None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but a strided view of its storage."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def view_of(tensor: torch.Tensor, key: int) -> View:
    """Describe a strided tensor as a view of storage ``key``."""
    return View(key, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())  # type: ignore[arg-type]


def on_meta(leaf: Any) -> bool:
    """Whether it is a strided tensor on meta."""
    return isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.layout is torch.strided


def address_of(tensor: torch.Tensor) -> int:
    """Tells storages apart while they live."""
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version

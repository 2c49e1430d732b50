"""Record, on meta, what would have been computed.

[Note: recording] A tensor on meta has a shape but no memory. It still has a storage object, and every tensor that
shares memory (a view, ``p.data``, the ``Parameter`` made from it) shares that object. So a tensor is described by a
`View`: the key of its storage, and where in it the tensor lies. Operators that only make views need no recording;
those that make a new storage or write into one do. The list of them, a `Recording`, hangs on the storages that it
describes (as an attribute: PyTorch keeps a storage's Python object as long as the storage) and dies with the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_ORDER = itertools.count()  # numbers storages and operators, over all recordings, in the order they came
_MARK = "_ds_ondevice_mark"

# The result has no value until something writes to it.
_UNWRITTEN = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)

_RESIZING = frozenset({"aten::resize_", "aten::resize_as_"})


@dataclass(frozen=True, slots=True)
class View:
    """A strided tensor in a recorded storage.

    ``key`` is the storage; ``size`` and ``stride``, one number a dimension, and ``offset`` count elements.
    """

    key: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """A real tensor that went into a recorded operator, and its version then."""

    tensor: torch.Tensor
    version: int

    def changed(self) -> bool:
        """Whether the tensor was written to since."""
        return _version(self.tensor) != self.version


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One recorded call.

    ``func`` is an operator, or a Python function that writes to its arguments; ``unwritten`` says that its result has
    no value until something writes to it; ``obstacle`` says why the call cannot be repeated, if it cannot.
    """

    order: int
    func: Any
    args: Any  # tensors replaced by View and Given
    kwargs: Any
    outputs: tuple[View | None, ...]  # one for each leaf of the result; None where that is no tensor on meta
    creates: frozenset[int]
    writes: tuple[int, ...]  # one for each tensor written to
    reads: frozenset[int]
    random: bool = False
    obstacle: str = ""
    unwritten: bool = False

    @property
    def name(self) -> str:
        """How an error calls it."""
        return str(self.func) if isinstance(self.func, torch._ops.OpOverload) else str(self.func.__qualname__)

    @property
    def is_source(self) -> bool:
        """Whether it depends on nothing, so that it can run at any time."""
        return not (self.random or self.reads)

    def stale(self) -> bool:
        """Whether a real tensor that it needs has changed since."""
        return any(isinstance(leaf, Given) and leaf.changed() for leaf in tree_leaves((self.args, self.kwargs)))


@dataclass(eq=False)
class Recording:
    """The operators of one outermost ``OnDevice`` block, and the earlier recordings whose storages they used."""

    ops: list[Op] = field(default_factory=list)
    parents: list[Recording] = field(default_factory=list)


@dataclass(eq=False)
class Mark:
    """What hangs on a recorded storage.

    ``key`` names it, ``recordings`` are those that made or changed it, and ``writes`` counts the writes seen: a tensor
    whose version is higher was written to elsewhere. A tensor that was given this storage by ``tensor.data = other``
    keeps counting from the version that it had: ``ahead`` is by how much it was ahead then.
    """

    key: int
    recordings: list[Recording]
    writes: int = 0
    ahead: int = 0

    def explains(self, version: int) -> bool:
        """Whether a tensor of this version was written to by nobody but those whose writes were seen."""
        return version <= self.writes + self.ahead


def mark_of(tensor: torch.Tensor) -> Mark | None:
    """The mark on the storage of a strided tensor, if it was recorded."""
    return getattr(tensor.untyped_storage(), _MARK, None)


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """``tensor.data = data``, which gives a tensor another storage and leaves its version as it is."""
    tensor.data = data
    mark = mark_of(tensor) if _on_meta(tensor) else None
    if mark is not None:
        mark.ahead = max(mark.ahead, _version(tensor) - mark.writes)


def is_recorded(leaf: Any) -> bool:
    """Whether it is a strided tensor on meta that was recorded."""
    return _on_meta(leaf) and mark_of(leaf) is not None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but a strided view of its storage."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def view_of(tensor: torch.Tensor, key: int) -> View:
    """Describe a strided tensor as a view of storage ``key``."""
    return View(key, tensor.dtype, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))


def active_recorder() -> Recorder | None:
    """The recorder at work on this thread, if there is one."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorder)]
    return modes[-1] if modes else None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operator that makes or changes a tensor on meta into a recording."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler at the first operator; nothing here is ever compiled

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types:
            wrapped = [part for leaf in tree_leaves((args, kwargs)) for part in _parts(leaf)]
            if not wrapped:  # fake tensors and the like: nothing here will ever have a value
                return func(*args, **kwargs)
            if _is_random(func):
                self._refuse(func, wrapped)
            return NotImplemented  # DTensor and the like: let it unpack itself, and record what it calls then
        if _needs_values(func, args, kwargs):
            args = _with_values(func, args)
        try:
            result = func(*args, **kwargs)
        except NotImplementedError:
            result = _shaped(func, args, kwargs)
        if isinstance(func, torch._ops.OpOverload):
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: torch._ops.OpOverload[Any, Any], args: Any, kwargs: Any, result: Any) -> None:
        inputs = {address_of(t): t for t in tree_leaves((args, kwargs)) if _on_meta(t)}
        outputs = [leaf if _on_meta(leaf) else None for leaf in tree_leaves(result)]
        created = {address_of(t): t for t in outputs if t is not None and address_of(t) not in inputs}
        written = [t for t in _written(func, args, kwargs) if _on_meta(t)]
        if not created and not written:
            return
        for tensor in written:
            self._count_write(tensor)
        if func._schema.name == "aten::set_":  # like a view: the tensor has another storage from now on
            return
        self.recording.ops.append(
            Op(
                order=next(_ORDER),
                func=func,
                args=tree_map(self._describe, args),
                kwargs=tree_map(self._describe, kwargs),
                outputs=tuple(None if t is None else self._describe(t) for t in outputs),
                creates=frozenset(self._key(t) for t in created.values()),
                writes=tuple(self._key(t) for t in written),
                reads=frozenset(self._key(t) for t in inputs.values()),
                random=_is_random(func),
                obstacle=_obstacle(func, (args, kwargs, result)),
                unwritten=func._schema.name in _UNWRITTEN,
            )
        )

    def record_call(self, func: Any, kwargs: dict[str, Any], written: torch.Tensor) -> None:
        """Record that ``func(**kwargs)``, which draws random numbers, would have written to one of its arguments."""
        if is_traceable_wrapper_subclass(written) or not _on_meta(written):
            self._refuse(func, _parts(written))
            return
        described = tree_map(self._describe, kwargs)
        reads = frozenset(leaf.key for leaf in tree_leaves(described) if isinstance(leaf, View))
        key = self._key(written)
        self.recording.ops.append(Op(next(_ORDER), func, (), described, (), frozenset(), (key,), reads, random=True))

    def _refuse(self, func: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Record that ``func`` drew random numbers into the local parts of a sharded tensor."""
        keys = tuple(self._key(tensor) for tensor in tensors if _on_meta(tensor))
        obstacle = "draws random numbers into a sharded tensor; initialise before sharding"
        op = Op(next(_ORDER), func, (), {}, (), frozenset(), keys, frozenset(keys), obstacle=obstacle)
        self.recording.ops.append(op)

    def _describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if _on_meta(leaf):
            return view_of(leaf, self._key(leaf))
        if leaf.layout is torch.strided and not leaf.untyped_storage().resizable():
            leaf = leaf.clone()  # memory of somebody else, such as a numpy array, changes without our notice
        return Given(leaf, _version(leaf))

    def _count_write(self, tensor: torch.Tensor) -> None:
        mark = mark_of(tensor)
        if mark is not None:
            mark.writes += 1
            if self.recording not in mark.recordings:
                mark.recordings.append(self.recording)

    def _key(self, tensor: torch.Tensor) -> int:
        mark = mark_of(tensor)
        if mark is None:
            mark = Mark(next(_ORDER), [self.recording])
            setattr(tensor.untyped_storage(), _MARK, mark)
        for recording in mark.recordings:
            if recording is not self.recording and recording not in self.recording.parents:
                self.recording.parents.append(recording)
        return mark.key


def _needs_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operator reads numbers out of a tensor on meta: ``.item()``, ``.cpu()``, ``real.copy_(meta)``."""
    if func is _aten._local_scalar_dense.default:
        return _on_meta(args[0])
    if func is _aten._to_copy.default:
        device = kwargs.get("device")
        return _on_meta(args[0]) and device is not None and device.type != "meta"
    return func is _aten.copy_.default and _on_meta(args[1]) and not args[0].is_meta


def _with_values(func: Any, args: Any) -> Any:
    from ds_ondevice._replay import value_of  # that module is built on this one

    if func is _aten.copy_.default:
        return (args[0], value_of(args[1]), *args[2:])
    return (value_of(args[0]), *args[1:])


def _shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator without a meta kernel gives: run on ones on the CPU, for its shapes alone.

    Raises:
        NotImplementedError: its shapes depend on values, it writes to its arguments, it fails on ones, or its result is
            not strided.
    """
    depends = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    if not isinstance(func, torch._ops.OpOverload) or depends.intersection(func.tags) or func._schema.is_mutable:
        raise
    try:
        ones = tree_map(lambda leaf: torch.ones_like(leaf, device="cpu") if _on_meta(leaf) else leaf, (args, kwargs))
        made = func(*ones[0], **ones[1])
    except Exception as error:
        raise NotImplementedError(f"{func} has no meta kernel, and fails on a tensor of ones: {error}") from error
    if not all(leaf.layout is torch.strided for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)):
        raise
    return tree_map(
        lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf, made
    )


def _on_meta(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.layout is torch.strided


def _is_random(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in func.tags


def _parts(leaf: Any) -> list[torch.Tensor]:
    """The tensors inside a tensor subclass that wraps others."""
    if not isinstance(leaf, torch.Tensor) or not is_traceable_wrapper_subclass(leaf):
        return []
    names, _ = leaf.__tensor_flatten__()
    return [getattr(leaf, name) for name in names]


def _obstacle(func: torch._ops.OpOverload[Any, Any], leaves: Any) -> str:
    if func._schema.name in _RESIZING:
        return "changes the size of a storage"
    tensors = (leaf for leaf in tree_leaves(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_meta)
    return "" if all(is_plain(tensor) for tensor in tensors) else "uses a sparse, quantized or conjugated tensor"


def address_of(tensor: torch.Tensor) -> int:
    """Tells storages apart while they live."""
    return int(tensor.untyped_storage()._cdata)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _written(func: torch._ops.OpOverload[Any, Any], args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments that the operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))

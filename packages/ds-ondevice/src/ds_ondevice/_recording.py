"""Record, on meta, what would have been computed; see [Note: recording] in `_ops`."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

from ds_ondevice._ops import (
    Blank,
    Given,
    Mark,
    Op,
    Recording,
    View,
    is_plain,
    leaves,
    mapped,
    mark_as,
    mark_of,
    on_meta,
    version_of,
    view_of,
)
from ds_ondevice._random import Draw, Streams
from ds_ondevice._schemas import Overload, Schema, schema_of

_aten = torch.ops.aten
_ORDER = itertools.count()  # numbers storages and operators, over all recordings, in the order they came

_LOG = logging.getLogger("ds.ondevice")
_NOT_PLAIN = "uses a sparse, quantized or conjugated tensor"


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """``tensor.data = data``, which gives a tensor another storage and leaves its version as it is."""
    tensor.data = data
    mark = mark_of(tensor) if on_meta(tensor) else None
    if mark is not None:
        mark.ahead = max(mark.ahead, version_of(tensor) - mark.writes)


def share_memory(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.share_memory_()``, which moves a storage on the CPU to where other processes see it."""
    recorder = active_recorder()
    if recorder is None or not on_meta(tensor):
        return tensor.share_memory_()  # type: ignore[no-any-return, no-untyped-call]
    recorder.record_call(torch.Tensor.share_memory_, (tensor,), {}, tensor, random=False)
    return tensor


def active_recorder() -> Recorder | None:
    """The recorder at work on this thread, if there is one."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorder)]
    return modes[-1] if modes else None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operator that makes or changes a tensor on meta into a recording.

    Args:
        watch: whether to watch the random number generators, too; see [Note: streams].
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler at the first operator; nothing here is ever compiled

    def __init__(self, *, watch: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._watch = watch
        self._streams = Streams()
        self._drew = False  # whether a draw was recorded
        self._drew_late = False  # whether numbers were really drawn after recorded ones

    def __enter__(self) -> Recorder:
        if self._watch:
            self._streams.open(next(_ORDER))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._streams.close()
        if self._drew_late:
            _LOG.warning(
                "random numbers were drawn on a real device inside OnDevice(device='meta') after others were recorded: "
                "they are not the ones that construction without meta would draw"
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        schema = schema_of(func)
        if types:
            wrapped = [part for leaf in leaves((args, kwargs)) for part in _parts(leaf)]
            if not wrapped:  # fake tensors and the like: nothing here will ever have a value
                return func(*args, **kwargs)
            if schema.random:
                self._refuse(func, wrapped, "draws random numbers into a sharded tensor; do that before sharding")
            return NotImplemented  # DTensor and the like: let it unpack itself, and record what it calls then
        if schema.fills_alone and on_meta(args[0]):  # what it would do on meta is nothing, and takes time
            self._record_fill(func, schema, args, kwargs)
            return args[0]
        if schema.needs_values and _needs_values(func, args, kwargs):
            args = _with_values(func, args)
        order = next(_ORDER)
        draws = self._streams.draws(order, _generator(kwargs)) if schema.random else ()
        try:
            result = func(*args, **kwargs)
        except NotImplementedError:
            result = _shaped(func, args, kwargs)
        asked = kwargs.get("dtype")
        if asked is not None and on_meta(result) and result.dtype is not asked:
            # Kernels for meta are built on torch.empty, which deepspeed.zero.Init replaces.
            result = _aten.empty_strided.default(result.shape, result.stride(), dtype=asked, device=result.device)
        if draws and not any(on_meta(leaf) for leaf in leaves((args, kwargs, result))):
            self._record_real_draw(func, args, kwargs, result, order, draws)
        else:
            self._record(func, schema, args, kwargs, result, order, draws)
        return result

    def _record_real_draw(
        self, func: Overload, args: Any, kwargs: Any, result: Any, order: int, draws: tuple[Draw, ...]
    ) -> None:
        """Record that an operator drew random numbers on a real device."""
        drawn_on = next((leaf.device.type for leaf in leaves(result) if isinstance(leaf, torch.Tensor)), "")
        self._streams.drawn(order, _generator(kwargs))
        self._drew_late = self._drew_late or self._drew
        op = Op(order, func, mapped(_blank, args), mapped(_blank, kwargs), draws=draws, drawn_on=drawn_on)
        self.recording.ops.append(op)

    def _record_fill(self, func: Overload, schema: Schema, args: Any, kwargs: Any) -> None:
        """Record an operator that fills one tensor on meta and uses no other."""
        tensor = args[0]
        key = self._write(tensor)
        keys = (key,)
        order = next(_ORDER)
        op = Op(order, func, (view_of(tensor, key), *args[1:]), kwargs, (), (), keys, keys, fills=True)
        if schema.random:
            op.draws = self._streams.draws(order, _generator(kwargs))
            self._drew = True
        if not is_plain(tensor):
            op.obstacle = _NOT_PLAIN
        self.recording.ops.append(op)

    def _record(
        self,
        func: Overload,
        schema: Schema,
        args: Any,
        kwargs: Any,
        result: Any,
        order: int,
        draws: tuple[Draw, ...],
    ) -> None:
        if schema.exchanges:
            self._refuse(func, filter(on_meta, leaves((args, kwargs, result))), schema.obstacle)
            return
        results = [leaf for leaf in (result if isinstance(result, (list, tuple)) else (result,)) if on_meta(leaf)]
        written = self._written(schema, args, kwargs) if schema.written else ()
        if not (results or written):
            return
        marks = [mark_of(leaf) for leaf in results]
        self.recording.made.extend(map(weakref.ref, results))
        if schema.views and None not in marks:
            return
        if schema.sets and on_meta(args[0]):  # like a view: the tensor has another storage, and its version goes on
            mark = self._mark(args[0])
            mark.ahead = max(mark.ahead, version_of(args[0]) + 1 - mark.writes)
            return
        plain = all(map(is_plain, results))
        described = _Description(self)
        op = Op(order, func, described.of(args), described.of(kwargs) if kwargs else kwargs)
        op.reads, op.givens = tuple(described.reads), tuple(described.givens)
        if None in marks:
            op.creates = tuple(self._key(leaf) for leaf, mark in zip(results, marks, strict=True) if mark is None)
        elif not written:
            return
        if op.creates:
            op.outputs = self._outputs(result)
        if written:
            op.writes = tuple(map(self._write, written))
        op.obstacle = schema.obstacle
        if not (plain and described.plain):
            op.obstacle = op.obstacle or _NOT_PLAIN
        op.unwritten, op.fills = schema.unwritten, schema.fills
        op.draws = draws
        self._drew = self._drew or bool(draws)
        self.recording.ops.append(op)

    def _outputs(self, result: Any) -> tuple[View | None, ...]:
        return tuple(view_of(leaf, self._key(leaf)) if on_meta(leaf) else None for leaf in leaves(result))

    def record_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: torch.Tensor, *, random: bool
    ) -> None:
        """Record that ``func(*args, **kwargs)`` would have written to one of its arguments.

        With ``random`` it fills the whole of it with random numbers.
        """
        if is_traceable_wrapper_subclass(written) or not on_meta(written):
            what = "draws random numbers into" if random else "changes"
            self._refuse(func, _parts(written), f"{what} a sharded tensor; do that before sharding")
            return
        described = _Description(self)
        order = next(_ORDER)
        op = Op(order, func, described.of(args), described.of(kwargs), writes=(self._key(written),), fills=random)
        op.reads, op.givens = tuple(described.reads), tuple(described.givens)
        if random:
            op.draws = self._streams.draws(order, _generator(kwargs))
            self._drew = True
        self.recording.ops.append(op)

    def _refuse(self, func: Any, tensors: Iterable[torch.Tensor], obstacle: str) -> None:
        """Record that ``func`` wrote to these tensors in a way that cannot be repeated."""
        keys = tuple(self._key(tensor) for tensor in tensors if on_meta(tensor))
        self.recording.ops.append(Op(next(_ORDER), func, (), {}, writes=keys, reads=keys, obstacle=obstacle))

    def _written(self, schema: Schema, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """The tensors on meta among the arguments that the operator writes to."""
        values = [args[position] if position < len(args) else kwargs.get(name) for position, name in schema.written]
        return [leaf for leaf in leaves(values) if on_meta(leaf)]

    def _write(self, tensor: torch.Tensor) -> int:
        """Count a write; return the key of the storage."""
        mark = self._mark(tensor)
        mark.writes += 1
        if mark.recordings[-1] is not self.recording and self.recording not in mark.recordings:
            mark.recordings.append(self.recording)
        return mark.key

    def _key(self, tensor: torch.Tensor) -> int:
        """The key of the storage of a tensor on meta."""
        return self._mark(tensor).key

    def _mark(self, tensor: torch.Tensor) -> Mark:
        """The mark on the storage of a tensor on meta; one that was not recorded gets a mark here."""
        mark = mark_of(tensor)
        if mark is None:
            mark = Mark(next(_ORDER), [self.recording])
            mark_as(tensor, mark)
            return mark
        for recording in mark.recordings:
            if recording is not self.recording and recording not in self.recording.parents:
                self.recording.parents.append(recording)
        return mark


class _Description:
    """Arguments of an operator with their tensors replaced.

    Attributes:
        reads: the keys of the storages that they use.
        givens: the real tensors among them.
        plain: whether all tensors on meta are nothing but views of their storages.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.reads: dict[int, None] = {}
        self.givens: list[Given] = []
        self.plain = True

    def of(self, value: Any) -> Any:
        """The description of an argument, or of a list, tuple or dict of them."""
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        kind = type(value)
        if kind is tuple:
            return tuple([self.of(item) for item in value])
        if kind is list:
            return [item if type(item) is int else self.of(item) for item in value]
        if kind is dict:
            return {name: self.of(item) for name, item in value.items()}
        return mapped(self.of, value) if isinstance(value, (list, tuple, dict)) else value

    def _of_tensor(self, tensor: torch.Tensor) -> View | Given:
        if on_meta(tensor):
            key = self._recorder._key(tensor)
            self.reads[key] = None
            self.plain = self.plain and is_plain(tensor)
            return view_of(tensor, key)
        self.plain = self.plain and not tensor.is_meta
        if tensor.layout is torch.strided and not tensor.untyped_storage().resizable():
            tensor = tensor.clone()  # memory of somebody else, such as a numpy array, changes without our notice
        given = Given(tensor, version_of(tensor))
        self.givens.append(given)
        return given


def _blank(leaf: Any) -> Any:
    return Blank(leaf.dtype, leaf.shape) if isinstance(leaf, torch.Tensor) else leaf


def _generator(kwargs: dict[str, Any]) -> torch.Generator | None:
    found = kwargs.get("generator")
    return found if isinstance(found, torch.Generator) else None


def _needs_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operator reads numbers out of a tensor on meta: ``.item()``, ``.cpu()``, ``real.copy_(meta)``."""
    if func is _aten._local_scalar_dense.default:
        return on_meta(args[0])
    if func is _aten._to_copy.default:
        device = kwargs.get("device")
        return on_meta(args[0]) and device is not None and device.type != "meta"
    return func is _aten.copy_.default and on_meta(args[1]) and not args[0].is_meta


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
        ones = mapped(lambda leaf: torch.ones_like(leaf, device="cpu") if on_meta(leaf) else leaf, (args, kwargs))
        made = func(*ones[0], **ones[1])
    except Exception as error:
        raise NotImplementedError(f"{func} has no meta kernel, and fails on a tensor of ones: {error}") from error
    if not all(leaf.layout is torch.strided for leaf in leaves(made) if isinstance(leaf, torch.Tensor)):
        raise
    return mapped(lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf, made)


def _parts(leaf: Any) -> list[torch.Tensor]:
    """The tensors inside a tensor subclass that wraps others."""
    if not isinstance(leaf, torch.Tensor) or not is_traceable_wrapper_subclass(leaf):
        return []
    names, _ = leaf.__tensor_flatten__()
    return [getattr(leaf, name) for name in names]

"""Which torch functions make new tensors, and what they are given.

[Note: what is redirected] The rule is PyTorch's own: a call inside ``OnDevice(dtype, device)`` makes what it would
make after ``torch.set_default_dtype(dtype)`` and inside ``with torch.device(device)``. So an explicit argument wins,
a tensor made from data with a dtype of its own (another tensor, an array) keeps that dtype, and the ``*_like`` and
``new_*`` families follow the tensor they are called on. Unlike those two, nothing here is seen by another thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from types import FrameType
from typing import Any

import torch
from torch._C import (
    _get_dispatch_stack_at,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ds_ondevice._claims import ANSWERS, CLAIMED, Body, answer
from ds_ondevice._initializers import DRAWING, IS_META, is_question_of_initializer, note_skipped
from ds_ondevice._ops import is_recorded
from ds_ondevice._recording import set_data, share_memory
from ds_ondevice._values import computed, printed
from ds_ondevice.errors import MetaValueError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Without a dtype argument these make the default floating-point dtype, whatever they are given.
_ALWAYS_FLOAT: frozenset[Any] = frozenset(
    {
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.zeros,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.eye,
    }
)

# These do unless they are given a complex number.
_FLOAT: frozenset[Any] = frozenset(
    {
        torch.linspace,
        torch.logspace,
        torch.range,
        torch.scalar_tensor,
        torch.bartlett_window,
        torch.blackman_window,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
    }
)

# These never make the default dtype by themselves: integers, or the dtype of tensors they are given.
_DEVICE_ONLY: frozenset[Any] = frozenset(
    {
        torch.randint,
        torch.randperm,
        torch.tril_indices,
        torch.triu_indices,
        torch.empty_quantized,
        torch.nested.nested_tensor,
        torch.sparse_coo_tensor,
        torch.sparse_compressed_tensor,
        torch.sparse_csr_tensor,
        torch.sparse_csc_tensor,
        torch.sparse_bsr_tensor,
        torch.sparse_bsc_tensor,
    }
)

_FROM_DATA: frozenset[Any] = frozenset({torch.tensor, torch.as_tensor, torch.asarray})


def _leaves(data: Any) -> Iterator[Any]:
    """The elements of nested lists and tuples, or of any other sequence that ``torch.tensor`` takes."""
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


def _is_data_of_python_floats(data: Any) -> bool:
    """Whether torch gives ``data`` the default dtype: it holds a float, and nothing that has a dtype of its own."""
    found = False
    for item in _leaves(data):
        if isinstance(item, complex) or hasattr(item, "dtype"):
            return False
        found = found or isinstance(item, float)
    return found


def _is_float(value: Any) -> bool:
    """Whether a number is no integer; numbers, unlike data, lose a dtype that they have."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, Real) and not isinstance(value, Integral)


def _data(args: Args, kwargs: Kwargs) -> Any:
    return args[0] if args else kwargs.get("data", kwargs.get("obj"))


def _full_is_float(args: Args, kwargs: Kwargs) -> bool:
    return _is_float(args[1] if len(args) > 1 else kwargs.get("fill_value"))


def _arange_is_float(args: Args, kwargs: Kwargs) -> bool:
    return any(_is_float(value) for value in (*args, *(kwargs.get(name) for name in ("start", "end", "step"))))


def _data_is_float(args: Args, kwargs: Kwargs) -> bool:
    return _is_data_of_python_floats(_data(args, kwargs))


def _normal_has_size(args: Args, kwargs: Kwargs) -> bool:
    return len(args) > 2 or kwargs.get("size") is not None


_SOMETIMES_FLOAT: dict[Any, Callable[[Args, Kwargs], bool]] = {
    torch.full: _full_is_float,
    torch.arange: _arange_is_float,
    torch.normal: _normal_has_size,
    **dict.fromkeys(_FROM_DATA, _data_is_float),
}

_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]

# These give integers a floating-point dtype because they are told to.
_CONVERSIONS: frozenset[Any] = frozenset(
    {
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.type_as,
        torch.Tensor.float,
        torch.Tensor.double,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.view,
        torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    }
)

FACTORIES: frozenset[Any] = _ALWAYS_FLOAT | _FLOAT | _DEVICE_ONLY | frozenset(_SOMETIMES_FLOAT)

# With booleans these choose, and make no number of them.
_CHOOSING: frozenset[Any] = frozenset({torch.where, torch.Tensor.where})

_INDEXING: frozenset[Any] = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__})
_PRINTING: frozenset[Any] = frozenset({torch.Tensor.__repr__, torch.Tensor.__format__})
_MOVING: frozenset[Any] = frozenset({torch.Tensor.cpu, torch.Tensor.to})

_HANDLED: frozenset[Any] = (
    FACTORIES
    | _FROM_DATA
    | _INDEXING
    | _PRINTING
    | _MOVING
    | {IS_META, _SET_DATA, torch.Tensor.new_tensor, torch.Tensor.share_memory_}
)


def _is_complex(args: Args, kwargs: Kwargs) -> bool:
    values = (*args, *kwargs.values())
    return any(isinstance(v, complex) or (isinstance(v, torch.Tensor) and v.is_complex()) for v in values)


def makes_default_dtype(func: Any, args: Args, kwargs: Kwargs) -> bool:
    """Whether this call, which has no ``dtype`` argument, makes the default floating-point dtype."""
    if func in _ALWAYS_FLOAT:
        return True
    if func in _FLOAT:
        return not _is_complex(args, kwargs)
    decide = _SOMETIMES_FLOAT.get(func)
    return decide is not None and decide(args, kwargs)


def _default_device() -> DeviceContext | None:
    """The innermost ``with torch.device(...)`` or ``torch.set_default_device`` in force on this thread."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    contexts = [mode for mode in modes if isinstance(mode, DeviceContext)]
    return contexts[-1] if contexts else None


class FactoryMode(TorchFunctionMode):
    """Gives factory functions the dtype and device that they were not given. One object for each ``with``.

    Args:
        dtype: for floating-point tensors.
        device: where new tensors go.
        body: the block's; see [Note: claims].
        skip_init: what draws random numbers into a tensor that is there does nothing.

    Attributes:
        depth: how many torch functions are running below this mode; 0 for a call that no function mode can see.
        legacy: the mode for such calls, if there is one. It is taken off while a torch function runs, so that the
            operators that the function calls need not pass through it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, body: Body, *, skip_init: bool = False) -> None:
        super().__init__()
        self._body = body if device.type == "meta" else None
        self._skip_init = skip_init
        self.dtype = dtype
        self.device = device
        self.depth = 0
        self.legacy: TorchDispatchMode | None = None
        self._outer_dtype = torch.get_default_dtype()
        self._outer_device = _default_device()
        self._below = _len_torch_function_stack()  # a device block that is opened inside goes below this mode
        self._promotes = dtype is not self._outer_dtype
        self._handled = (FACTORIES | _FROM_DATA) if self._body is None else _HANDLED
        if skip_init:
            self._handled |= DRAWING | {IS_META}

    @property
    def is_as_usual(self) -> bool:
        """Whether tensors are made on the CPU, in torch's default dtype."""
        return self.device.type == "cpu" and not self._promotes

    def __enter__(self) -> FactoryMode:
        # Most functions make no tensor; what they do need not be looked at where nothing is recorded or converted.
        self._passes_through = self._body is None and not self._promotes and self.legacy is None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if self._passes_through and func not in self._handled:
            return func(*args, **kwargs)
        if self._body is not None:
            if func in ANSWERS and self.owns_device():
                claimed = answer(func, args, self._body, sys._getframe(1))
                if claimed is not None:
                    return claimed
            for value in (*args, *kwargs.values()) if kwargs else args:
                if value is CLAIMED:
                    args, kwargs = self._unclaimed(args, kwargs)
                    break
        hidden = self.legacy is not None and self._hide_legacy()
        self.depth += 1
        try:
            if func in self._handled:
                return self._handle(func, args, dict(kwargs), sys._getframe(1))
            result = func(*args, **kwargs)
            if self._promotes and self._is_promoted(func, args, kwargs, result):
                if func in _CHOOSING:
                    return result.to(self.dtype)
                result = func(*tree_map(self._as_default, args), **tree_map(self._as_default, kwargs))
            return result
        except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
            return computed(func, args, kwargs, error)
        finally:
            self.depth -= 1
            if hidden and self.legacy is not None:
                _push_on_torch_dispatch_stack(self.legacy)

    def _handle(self, func: Any, args: Args, kwargs: Kwargs, caller: FrameType) -> Any:
        """Call one of the functions that are `_HANDLED`."""
        if self._skip_init and (func in DRAWING or is_question_of_initializer(func, caller)):
            return True if func == IS_META else kwargs.get("tensor", args[0] if args else None)
        if func == IS_META:
            note_skipped(args[0], caller)
        elif func in FACTORIES and kwargs.get("out") is None:
            self._complete(func, args, kwargs)
        if func in _FROM_DATA or func is torch.Tensor.new_tensor:
            return _from_data(func, args, kwargs)
        if func == _SET_DATA:
            return set_data(*args)
        if func is torch.Tensor.share_memory_:
            return share_memory(args[0])
        if func in _INDEXING:
            args = (args[0], self._recordable(args[1]), *args[2:])
        below = self._body is not None and not self._body.runs(caller)
        if func in _PRINTING and below and is_recorded(args[0]):
            return printed(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except MetaValueError:  # below the block the tensor is on the CPU already
            if func not in _MOVING or not below:
                raise
            return args[0].to(dtype=next((value for value in args if isinstance(value, torch.dtype)), None))

    def _recordable(self, index: Any) -> Any:
        """An index of a tensor, with lists as tensors that are recorded: torch makes those unseen."""
        if isinstance(index, tuple):
            return tuple(self._recordable(item) for item in index)
        if isinstance(index, (list, range)) and len(index) and not any(isinstance(i, slice) for i in index):
            return _from_data(torch.tensor, (list(index),), {"device": self.device})
        return index

    def _hide_legacy(self) -> bool:
        """Take the legacy mode off, if it is on top."""
        size = _len_torch_dispatch_stack()
        if not size or _get_dispatch_stack_at(size - 1) is not self.legacy:
            return False
        _pop_torch_dispatch_stack(None)
        return True

    def _unclaimed(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments with the block's device where a recorded tensor's own is given."""
        args = tuple(self.device if value is CLAIMED else value for value in args)
        return args, {name: self.device if value is CLAIMED else value for name, value in kwargs.items()}

    def _is_promoted(self, func: Any, args: Args, kwargs: Kwargs, result: Any) -> bool:
        """Whether torch gave integers the default dtype, as in ``torch.arange(4) * 0.5``: that is the block's."""
        if not isinstance(result, torch.Tensor) or result.dtype is not self._outer_dtype or func in _CONVERSIONS:
            return False
        if kwargs.get("dtype") is not None or self.dtype_for(result.dtype) is not self.dtype:
            return False
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return bool(given) and not any(tensor.is_floating_point() or tensor.is_complex() for tensor in given)

    def _as_default(self, leaf: Any) -> Any:
        return leaf.to(self.dtype) if isinstance(leaf, torch.Tensor) else leaf

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a tensor of ``dtype`` made without a word about it shall have."""
        return self.dtype if dtype is self._outer_dtype and torch.get_default_dtype() is self._outer_dtype else dtype

    def owns_device(self) -> bool:
        """Whether no ``torch.device`` block was opened inside ours: that one is as explicit as an argument."""
        if self._outer_device is None and _len_torch_function_stack() == self._below:
            return True
        return _default_device() is self._outer_device

    def _complete(self, func: Any, args: Args, kwargs: Kwargs) -> None:
        if kwargs.get("dtype") is None and makes_default_dtype(func, args, kwargs):
            kwargs["dtype"] = self.dtype_for(torch.get_default_dtype())
        wanted = func is not torch.normal or _normal_has_size(args, kwargs)
        if wanted and kwargs.get("device") is None and not kwargs.get("pin_memory") and self.owns_device():
            kwargs["device"] = self.device


def _from_data(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Call a function that makes a tensor of Python data.

    On meta in two steps, so that the data can be recorded; and elements that are tensors on meta (which torch reads
    where no mode can see it) are read first.
    """
    source = args[0] if func is torch.Tensor.new_tensor else None  # the tensor whose dtype and device are defaults
    data = _data(args if source is None else args[1:], kwargs)
    device = kwargs.get("device") or (None if source is None else source.device)
    if isinstance(data, torch.Tensor) or device is None:
        return func(*args, **kwargs)
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in _leaves(data)):
        data = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, data)
    options = {**kwargs, "dtype": kwargs.get("dtype") or (None if source is None else source.dtype), "device": device}
    for name in ("data", "obj", "requires_grad"):
        options.pop(name, None)
    make = func if source is None else torch.tensor
    on_meta = torch.device(device).type == "meta"
    made = make(data, **{**options, "device": "cpu" if on_meta else device})
    return (made.to("meta") if on_meta else made).requires_grad_(bool(kwargs.get("requires_grad", False)))

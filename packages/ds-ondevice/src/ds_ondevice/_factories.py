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
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves, tree_map

from ds_ondevice._claims import ANSWERS, CLAIMED, Body, answer
from ds_ondevice._initializers import note_skipped
from ds_ondevice._recording import set_data
from ds_ondevice._values import computed

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Without a dtype argument these make the default floating-point dtype, whatever they are given (but see `_is_complex`).
_FLOAT: frozenset[Any] = frozenset(
    {
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.zeros,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.eye,
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

FACTORIES: frozenset[Any] = _FLOAT | _DEVICE_ONLY | frozenset(_SOMETIMES_FLOAT)


def _is_complex(args: Args, kwargs: Kwargs) -> bool:
    values = (*args, *kwargs.values())
    return any(isinstance(v, complex) or (isinstance(v, torch.Tensor) and v.is_complex()) for v in values)


def makes_default_dtype(func: Any, args: Args, kwargs: Kwargs) -> bool:
    """Whether this call, which has no ``dtype`` argument, makes the default floating-point dtype."""
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

    Attributes:
        depth: how many torch functions are running below this mode; 0 for a call that no function mode can see.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, body: Body) -> None:
        super().__init__()
        self._body = body if device.type == "meta" else None
        self.dtype = dtype
        self.device = device
        self.depth = 0
        self._outer_dtype = torch.get_default_dtype()
        self._outer_device = _default_device()

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._body is not None:
            if func in ANSWERS and self.owns_device():
                claimed = answer(func, args, self._body, sys._getframe(1))
                if claimed is not None:
                    return claimed
            args, kwargs = self._unclaimed(args, kwargs)
        self.depth += 1
        try:
            if func in FACTORIES and kwargs.get("out") is None:
                self._complete(func, args, kwargs)
            else:
                note_skipped(func, args, sys._getframe(1))
            if func in _FROM_DATA or func is torch.Tensor.new_tensor:
                return _from_data(func, args, kwargs)
            if func == _SET_DATA:  # a new object at each look-up
                return set_data(*args)
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
                return computed(func, args, kwargs, error)
            if self.dtype is not self._outer_dtype and self._is_promoted(func, args, kwargs, result):
                result = func(*tree_map(self._as_default, args), **tree_map(self._as_default, kwargs))
            return result
        finally:
            self.depth -= 1

    def _unclaimed(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments with the block's device where a recorded tensor's own is given."""
        if any(value is CLAIMED for value in (*args, *kwargs.values())):
            args = tuple(self.device if value is CLAIMED else value for value in args)
            kwargs = {name: self.device if value is CLAIMED else value for name, value in kwargs.items()}
        return args, kwargs

    def _is_promoted(self, func: Any, args: Args, kwargs: Kwargs, result: Any) -> bool:
        """Whether torch gave integers the default dtype, as in ``torch.arange(4) * 0.5``: that is the block's."""
        if not isinstance(result, torch.Tensor) or result.dtype is not self._outer_dtype or func in _CONVERSIONS:
            return False
        if kwargs.get("dtype") is not None or func in FACTORIES or self.dtype_for(result.dtype) is not self.dtype:
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

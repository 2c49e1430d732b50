"""``OnDevice``: build a model on a device and in a dtype, or on meta to be materialized later."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Generator
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from ds_ondevice._claims import Body
from ds_ondevice._factories import FactoryMode
from ds_ondevice._legacy import LegacyMode, is_in_legacy_mode
from ds_ondevice._modules import Construction
from ds_ondevice._recording import Recorder, active_recorder

__all__ = ["OnDevice"]

_F = TypeVar("_F", bound=Callable[..., Any])


class OnDevice:
    """Context manager and decorator: new tensors get a device, and floating-point ones a dtype.

    Inside, every function of torch that makes a tensor makes what it would make after
    ``torch.set_default_dtype(dtype)`` and inside ``with torch.device(device)``: integers, booleans and complex numbers
    get the device only, and an explicit ``dtype=`` or ``device=`` wins, as does a ``with torch.device(...)`` opened
    inside. Other threads notice nothing, blocks nest, nothing of torch is patched.

    On meta it also records what is computed, for ``materialize`` to compute again on a real device; and small values
    that construction needs (``.item()``, ``.tolist()``, ``.cpu()``) are computed on the CPU at once.

    As a decorator it takes functions, generators, coroutines and classes. A function runs in a block of its own at
    every call, a generator or coroutine at every step, and a class stays the class it is and is constructed in one.

    Args:
        dtype: a floating-point dtype, or its name, such as ``"bfloat16"``; None is torch's default dtype.
        device: any device: "meta", "cpu", "cuda:1", ...
        enabled: False makes it do nothing.
        include_buffers: False leaves the buffers of modules real, on the CPU, when ``device`` is meta.
        skip_init: what fills a tensor with random numbers does nothing, as before a checkpoint is loaded. On meta such
            a parameter then has no value for `materialize` to compute.
        record: False makes a block on meta do what ``torch.device("meta")`` does and no more: for those who want shapes
            only. Recorded parameters are of a class of their own until they are materialized, and ``torch.compile`` on
            meta does not take it.

    Raises:
        TypeError: ``dtype`` is not a floating-point dtype, or something that cannot be decorated is.
        ValueError: ``device`` names none.

    Example:
        >>> import torch
        >>> from ds_ondevice import OnDevice
        >>> with OnDevice(dtype=torch.float16, device="meta"):
        ...     model = torch.nn.Embedding(10, 4)
        >>> model.weight.dtype, model.weight.device.type
        (torch.float16, 'meta')
    """

    def __init__(
        self,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int = "meta",
        enabled: bool = True,
        *,
        include_buffers: bool = True,
        skip_init: bool = False,
        record: bool = True,
    ) -> None:
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, not {dtype!r}")
        if isinstance(dtype, str) and found is None:
            raise TypeError(f"dtype must name a floating-point torch.dtype, such as 'bfloat16', not {dtype!r}")
        try:
            self.device = torch.device(device)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"device must name a torch device such as 'meta' or 'cuda:0', not {device!r}: {error}"
            ) from None
        self.dtype: torch.dtype | None = found
        self.enabled = enabled
        self.include_buffers = include_buffers
        self.skip_init = skip_init
        self.record = record
        if not (record or include_buffers):
            raise ValueError("include_buffers=False computes buffers from a recording: pass record=True")
        self._open = threading.local()  # .stacks: the blocks that this thread has open on this object

    def __enter__(self) -> OnDevice:
        return self._enter(Body(_opener(sys._getframe(1)), called=False))

    def _enter(self, body: Body) -> OnDevice:
        with contextlib.ExitStack() as stack:
            if self.enabled:
                if self.record and self.device.type == "meta" and active_recorder() is None:
                    recorder = stack.enter_context(Recorder())
                    stack.enter_context(Construction(recorder.recording, include_buffers=self.include_buffers))
                dtype = self.dtype or torch.get_default_dtype()
                factory = FactoryMode(dtype, self.device, body, skip_init=self.skip_init)
                if not factory.is_as_usual or is_in_legacy_mode():
                    stack.enter_context(LegacyMode(factory))
                stack.enter_context(factory)
            self._stacks().append(stack.pop_all())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stacks().pop().__exit__(exc_type, exc_value, traceback)

    def __call__(self, fn: _F) -> _F:
        """Decorate a function, a generator, a coroutine or a class."""
        if isinstance(fn, type):
            fn.__init__ = self(fn.__init__)  # type: ignore[misc]
            return fn
        if not callable(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(f"{fn!r} cannot be decorated: it is no function, generator, coroutine or class")

        @functools.wraps(fn)
        def function(*args: Any, **kwargs: Any) -> Any:
            self._enter(Body(sys._getframe(), called=True))
            try:
                return fn(*args, **kwargs)
            finally:
                self.__exit__(None, None, None)

        @functools.wraps(fn)
        def generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from self._step_by_step(fn(*args, **kwargs)))

        @functools.wraps(fn)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await types.coroutine(self._step_by_step)(fn(*args, **kwargs))

        made: Any = function
        if inspect.iscoroutinefunction(fn):
            made = coroutine
        elif inspect.isgeneratorfunction(fn):
            made = generator
        return made  # type: ignore[no-any-return]

    def _step_by_step(self, inner: Any) -> Generator[Any, Any, Any]:
        """Run a generator or coroutine with the block open while its own code runs, and closed in between."""
        step, value = inner.send, None
        while True:
            self._enter(Body(sys._getframe(), called=True))
            try:
                made = step(value)
            except StopIteration as end:
                return end.value
            finally:
                self.__exit__(None, None, None)
            try:
                step, value = inner.send, (yield made)
            except BaseException as error:
                step, value = inner.throw, error

    def fp_tensor_constructor(self, fn: Callable[..., Any], target_fp_dtype: torch.dtype) -> Callable[..., Any]:
        """Wrap a function that makes tensors, so that it makes them on this device and in ``target_fp_dtype``."""
        return OnDevice(target_fp_dtype, self.device)(fn)

    def get_new_tensor_fn_for_dtype(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """A function ``(cls, *args)`` that does what ``torch.Tensor(*args)`` does, on this device and in ``dtype``."""

        @OnDevice(dtype, self.device)
        def new_tensor(cls: type[torch.Tensor], *args: Any) -> torch.Tensor:
            made = torch.Tensor(*args)
            return made if cls is torch.Tensor else made.as_subclass(cls)

        return new_tensor

    def _stacks(self) -> list[contextlib.ExitStack]:
        stacks: list[contextlib.ExitStack] | None = getattr(self._open, "stacks", None)
        if stacks is None:
            stacks = self._open.stacks = []
        return stacks


def _opener(frame: FrameType) -> FrameType:
    """The frame whose block it is, where ``contextlib`` opens it on behalf of that."""
    while frame.f_globals.get("__name__") == "contextlib" and frame.f_back is not None:
        frame = frame.f_back
    return frame

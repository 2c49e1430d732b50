"""Puts a range around whatever can be decorated, and leaves it what it is: a class, a property, a method, a function.

[Note: kinds] A Python function becomes a function (`_ranged.wrap`). What holds functions (a class, a property, a bound
method, an ``nn.Module``) holds ranged ones afterwards. Everything else that can be called, such as a builtin, a
function behind ``functools.lru_cache`` or an object with ``__call__``, becomes a `RangedCallable`, which passes every
attribute through, its class too: a program must not take another way because a tool is attached.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any, cast

from ds_logging._nvtx import ranged as _ranged
from ds_logging._nvtx.backends import Span
from ds_logging._nvtx.ranged import wrap
from ds_logging.errors import ArgumentError

SpanFor = Callable[[str], "Span | None"]
"""Given the name that a range has unless the user gave one: what to draw, or None where all stays as it is."""

_IMMUTABLE_TYPE, _HEAP_TYPE = 1 << 8, 1 << 9  # Py_TPFLAGS_IMMUTABLETYPE, Py_TPFLAGS_HEAPTYPE
_FIELDS_OF_PROXY = ("_ranged_call", "_span", "_switch", "__wrapped__", "__doc__", "__module__")


def instrument(func: Any, span_for: SpanFor, switch: ModuleType) -> Any:
    """Return ``func`` with ranges, or ``func`` itself where nothing is drawn.

    Raises:
        ArgumentError: it can neither be called nor holds anything that can.
    """
    if isinstance(func, (staticmethod, classmethod)):
        inner = instrument(func.__func__, span_for, switch)
        return func if inner is func.__func__ else type(func)(inner)
    if isinstance(func, property):
        return _property(func, span_for, switch)
    if isinstance(func, (functools.cached_property, functools.singledispatchmethod)):
        return _descriptor(func, span_for, switch)
    if isinstance(func, functools.partialmethod):
        inner = instrument(func.func, span_for, switch)
        return func if inner is func.func else type(func)(inner, *func.args, **func.keywords)
    if isinstance(func, type):
        return _class(func, span_for, switch)
    if not callable(func):
        raise ArgumentError(f"func={func!r} cannot be called; decorate a function, a class or a property")
    if isinstance(func, MethodType):
        inner = instrument(func.__func__, span_for, switch)
        return func if inner is func.__func__ else MethodType(inner, func.__self__)
    span = span_for(_name_of(func))
    if span is None:
        return func
    if isinstance(func, _module_class()):
        # A proxy would not be found among the parts of the module that holds it.
        func.forward = instrument(func.forward, lambda name: span, switch)
        return func
    if inspect.isfunction(func):
        return wrap(func, span, switch)
    if isinstance(func, functools.partial):
        # Only a partial object of a function that suspends is taken for one by inspect.
        suspends = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(kind(func.func) for kind in suspends):
            inner = instrument(func.func, lambda name: span, switch)
            return type(func)(inner, *func.args, **func.keywords)
    return RangedCallable(func, span, switch)


class RangedCallable:
    """An object that is called inside a range, and else is the object that it stands for."""

    def __init__(self, func: Any, span: Span, switch: ModuleType) -> None:
        # A function of the same kind, so that what it calls asynchronously is ranged while it runs.
        call = _function_like(func)
        fields = (wrap(call, span, switch), span, switch, func, func.__doc__, getattr(func, "__module__", None))
        for name, value in zip(_FIELDS_OF_PROXY, fields, strict=True):
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Of builtins torch.compile knows each by itself, and would not look into this one.
        return RangedCallable if inspect.isroutine(self.__wrapped__) else type(self.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ranged_call(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if not hasattr(type(self.__wrapped__), "__get__"):  # a builtin does not become a method
            return self
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        # A field that is not made yet; and what copy asks for, which would copy only what this stands for.
        if name in _FIELDS_OF_PROXY or name in ("__copy__", "__deepcopy__"):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__wrapped__, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__wrapped__, name)

    def __getitem__(self, key: Any) -> Any:
        return self.__wrapped__[key]

    def __dir__(self) -> list[str]:
        return dir(self.__wrapped__)

    def __repr__(self) -> str:
        return f"<ranged {self.__wrapped__!r}>"

    def __reduce__(self) -> Any:
        """By name where that leads here, as functions are; else by what it stands for."""
        name = getattr(self.__wrapped__, "__qualname__", None)
        home = getattr(self.__wrapped__, "__module__", None)
        if name is not None and home is not None and _found(home, name) is self:
            return name
        return _again, (self.__wrapped__, self._span, self._switch.__name__)


def _again(func: Any, span: Span, switch: str) -> RangedCallable:
    return RangedCallable(func, span, importlib.import_module(switch))


def _found(module: str, qualname: str) -> Any:
    try:
        return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


def _function_like(func: Any) -> Callable[..., Any]:
    """Return what to wrap for an object: its ``__call__`` where that is a Python function, which says its kind."""
    code = type(func).__call__
    return MethodType(code, func) if inspect.isfunction(code) else func


def _property(func: property, span_for: SpanFor, switch: ModuleType) -> property:
    made: Any = func
    for part, replace in (("fget", "getter"), ("fset", "setter"), ("fdel", "deleter")):
        function = getattr(func, part)
        inner = None if function is None else instrument(function, span_for, switch)
        if inner is not function:
            made = getattr(made, replace)(inner)
    return cast(property, made)


def _descriptor(func: Any, span_for: SpanFor, switch: ModuleType) -> Any:
    """Copy a descriptor and range what it calls."""
    held = "func" if isinstance(func, functools.cached_property) else "dispatcher"
    inner = instrument(getattr(func, held), span_for, switch)
    if inner is getattr(func, held):
        return func
    made = copy.copy(func)
    setattr(made, held, inner)
    return made


def _class(cls: Any, span_for: SpanFor, switch: ModuleType) -> Any:
    """Range the constructor of a class, which stays the same class."""
    if cls.__flags__ & _IMMUTABLE_TYPE or not cls.__flags__ & _HEAP_TYPE:
        raise ArgumentError(f"func={cls!r} is built in, its __init__ cannot be replaced: decorate a function")
    own = cls.__dict__.get("__init__")
    if own is None and inspect.get_annotations(cls):
        # A decorator above this one, such as dataclass, makes an __init__ only where there is none.
        raise ArgumentError(
            f"func={cls!r} has fields and no __init__ of its own: put instrument_w_nvtx above @dataclass, or write one"
        )
    span = span_for(cls.__qualname__)
    if span is not None:
        plain = _inherited_init(cls) if own is None else own
        ranged = wrap(plain, span, switch)

        @functools.wraps(plain)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            # The compiler can see an object that is made only if it need not look into what `ranged` holds.
            (plain if _ranged.is_compiling() else ranged)(self, *args, **kwargs)

        cls.__init__ = __init__
    return cls


def _inherited_init(cls: Any) -> Callable[..., None]:
    plain_new: Any = object.__new__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        following: Any = super(cls, self).__init__  # of the object's own class, which may have further bases
        if getattr(following, "__objclass__", None) is object and type(self).__new__ is not plain_new:
            return  # object.__init__ ignores the arguments of __new__ only where no __init__ stands before it
        following(*args, **kwargs)

    made: Any = functools.wraps(cls.__init__)(__init__)
    if cls.__init__ is object.__init__:
        made.__signature__ = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)])
    return cast("Callable[..., None]", made)


def _module_class() -> Any:
    """Return ``torch.nn.Module``, or what nothing is an instance of while torch is not imported."""
    return getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", ())


def _name_of(func: Any) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__qualname__", None) or type(func).__qualname__

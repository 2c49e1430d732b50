"""Private attributes that a later version of an engine has renamed: turned into an `EngineChangedError`.

[Note: private] Adapters read private attributes of torch and DeepSpeed, as there is no public way to find the pieces. A
later version may rename one. The user then gets an `EngineChangedError`, which names the version and the attribute, in
place of an `AttributeError`. A failed look-up counts as such where the modules of `_READERS` made it, or code of the
engine that these called; and an attribute's only where the object is of a class of the engine's.
"""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import nn

from ds_fragment.__about__ import __version__
from ds_fragment.engines.loaded import composable_state, is_a
from ds_fragment.errors import EngineChangedError

_TRIED = "torch 2.6 to 2.13 and DeepSpeed 0.16 to 0.19"
_ENGINES = ("torch.", "deepspeed.")
_READERS = ("ds_fragment.engines.",)


class known_engine(contextlib.ContextDecorator):
    """Raise an `EngineChangedError` for an attribute that an engine lacks and an adapter called inside reads."""

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, AttributeError | KeyError):
            changed = engine_changed(error)
            if changed is not None:
                raise changed from error


def engine_changed(error: Exception) -> EngineChangedError | None:
    """The error to raise for a failed look-up; None if the look-up is not an adapter's. See [Note: private]."""
    if not _asked_by_reader(error.__traceback__):
        return None
    if isinstance(error, AttributeError):
        if not any(module.startswith(_ENGINES) for module in _modules(error.obj)):
            return None
        lacking = f"{_kind(error.obj)} has no attribute '{error.name}'"
    elif isinstance(error, KeyError):
        lacking = f"one of its tables has no entry {error.args[0]!r}" if error.args else "one of its tables is empty"
    else:
        return None
    deepspeed = sys.modules.get("deepspeed")
    versions = f"torch {torch.__version__}"
    if deepspeed is not None:
        versions += f", DeepSpeed {getattr(deepspeed, '__version__', 'of no version')}"
    return EngineChangedError(
        f"ds-fragment {__version__} does not know this version of an engine ({versions}): {lacking}. It was tried with "
        f"{_TRIED}: install one of those, or a later ds-fragment, or report it"
    )


def check_wrappers(model: nn.Module) -> None:
    """Read the attributes of a model's wrappers by which adapters recognise them, and which they may lack silently.

    Raises:
        AttributeError: a wrapper does not have it.
    """
    for module in model.modules():
        if is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            handle = module._handle
            for param in () if handle is None else handle.flat_param._params or ():  # type: ignore[union-attr]
                param._fsdp_flattened  # noqa: B018
        elif is_a(module, "torch.distributed.fsdp", "FSDPModule"):
            state: Any = composable_state(module)
            if not hasattr(state, "_fsdp_param_groups"):  # which there was one of before
                state._fsdp_param_group  # noqa: B018


def _asked_by_reader(trace: TracebackType | None) -> bool:
    """Whether the innermost caller outside the engines is one of `_READERS`."""
    caller = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if not name.startswith(_ENGINES):
            caller = name
        trace = trace.tb_next
    return caller.startswith(_READERS)


def _modules(thing: object) -> list[str]:
    """The modules that an object is from: itself, or those of its class and the bases."""
    if isinstance(thing, ModuleType):
        return [thing.__name__]
    return [kind.__module__ for kind in (thing if isinstance(thing, type) else type(thing)).__mro__]


def _kind(thing: object) -> str:
    """A name for an object in a message."""
    if isinstance(thing, ModuleType):
        return f"module {thing.__name__}"
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"

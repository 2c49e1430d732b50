"""Read and replace a submodule by its dotted path. The names of ``deepspeed.utils.module_utils``.

Paths are those of ``torch.nn.Module.named_modules``: ``"encoder.layers.0"``, an index of a list or sequence being a
part like any other. No function here communicates; a rank may call them alone.
"""

from __future__ import annotations

from typing import Any

from ds_fragment.errors import FragmentError

__all__ = ["ModulePathError", "recursive_getattr", "recursive_setattr"]


class ModulePathError(FragmentError, AttributeError):
    """A dotted path has a part that is empty, or that its object does not have."""


def recursive_getattr(model: Any, module_name: str) -> Any:
    """Return what stands at a dotted path below a model: a submodule, a parameter or any other attribute.

    Args:
        model: where the path begins, a ``torch.nn.Module`` or any other object.
        module_name: the path, at least one name.

    Returns:
        The object itself, not a copy.

    Raises:
        ModulePathError: the path is empty, or an object on the way lacks the next part; the message says which one.
            It is an ``AttributeError``, too.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    >>> recursive_getattr(model, "1.0")
    ReLU()
    >>> recursive_getattr(model, "1.2.weight")
    Traceback (most recent call last):
    ds_fragment.module_utils.ModulePathError: module_name='1.2.weight': '1' is a Sequential and has no '2'
    """
    return _descend(model, _parts(module_name), module_name)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Put an object at a dotted path below a model, in the place of what stands there if anything does.

    All parts but the last one must exist. Nothing else is changed: other references to the old object stay.

    Args:
        model: where the path begins, a ``torch.nn.Module`` or any other object.
        module_name: the path, at least one name.
        module: what to put there; whatever the owner's ``__setattr__`` takes, for a ``torch.nn.Module`` a submodule, a
            parameter where one stands, or any other value.

    Raises:
        ModulePathError: the path is empty, or an object on the way lacks the next part; nothing was changed. It is an
            ``AttributeError``, too.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    >>> recursive_setattr(model, "1.0", nn.Tanh())
    >>> model[1][0]
    Tanh()
    """
    *path, last = _parts(module_name)
    setattr(_descend(model, path, module_name), last, module)


def _parts(module_name: str) -> list[str]:
    parts = module_name.split(".") if isinstance(module_name, str) else []
    if not parts or not all(parts):
        raise ModulePathError(
            f"module_name={module_name!r} is no path: give names with dots between them, as 'layers.0'"
        )
    return parts


def _descend(model: Any, parts: list[str], module_name: str) -> Any:
    found = model
    for depth, part in enumerate(parts):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            where = repr(".".join(parts[:depth])) if depth else "the model"
            # The cause is kept: it may come from inside a property that does exist.
            raise ModulePathError(
                f"module_name={module_name!r}: {where} is a {type(found).__name__} and has no {part!r}"
            ) from error
    return found

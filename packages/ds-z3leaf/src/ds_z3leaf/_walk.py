"""All modules of a model by name, in one fast pass.

[Note: names] A module's name is the one that ``model.named_modules()`` gives it. Wrappers (`torch.compile`, activation
checkpointing, FSDP1) put words of their own into it; its *short* name is without these words.
"""

from __future__ import annotations

from torch import nn

from ds_z3leaf.errors import LeafTypeError, LeafValueError

WRAPPER_WORDS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_LONGEST = 10_000  # characters; only a module that holds itself has a longer name
Entry = tuple[str, str, nn.Module]


def check_model(model: object) -> None:
    """Raise `LeafTypeError` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise LeafTypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


def walk(model: nn.Module) -> list[Entry]:
    """Name, short name and module, under every name that it has, in the order of ``named_modules()``.

    ``named_modules()`` passes each module through as many generators as it lies deep; this takes a third of the time.

    Raises:
        LeafValueError: a module holds itself.
    """
    entries: list[Entry] = []
    stack: list[Entry] = [("", "", model)]
    while stack:
        entry = stack.pop()
        entries.append(entry)
        name, short, module = entry
        children = module._modules
        if not children:
            continue
        if len(name) > _LONGEST:
            raise LeafValueError(f"{type(model).__name__} holds a module that holds itself: {name[:80]}...")
        prefix, short_prefix = (f"{name}." if name else ""), (f"{short}." if short else "")
        for part, child in reversed(children.items()):
            if child is not None:
                shorter = short if part in WRAPPER_WORDS else short_prefix + part
                stack.append((prefix + part, shorter, child))
    return entries


def is_wrapped(name: str) -> bool:
    """Whether a name ends in a wrapper's word: then the wrapper itself has the short name."""
    return name.rpartition(".")[2] in WRAPPER_WORDS


def short_name(name: str) -> str:
    """A name without the wrappers' words."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_WORDS)


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds; None for other modules."""
    inner = (child for part, child in module._modules.items() if part in WRAPPER_WORDS)
    return next(inner, None)


def class_name(module: nn.Module) -> str:
    """The name of a module's class as its author wrote it: without wrappers around it and FSDP2's prefix."""
    while True:
        inner = wrapped_module(module)
        if inner is None:
            break
        module = inner
    kind = type(module)
    if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule":
        kind = kind.__mro__[2]
    return kind.__name__

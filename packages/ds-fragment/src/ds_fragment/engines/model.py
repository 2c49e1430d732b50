"""Models as users bring them: taken out of what wraps them, with the parameters that are their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from ds_fragment.engines import held_by
from ds_fragment.engines.loaded import is_gathered
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import InvalidValueError
from ds_fragment.record import registry

Named = tuple[str, torch.Tensor]

# What wraps a module, by the package and the name of its class: the attribute that has the wrapped module. Where in its
# package a class is differs between versions. Only wrappers use the names that begin with an underscore.
_WRAPPERS = {
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("torch", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch", "ActivationWrapper"): "_checkpoint_wrapped_module",  # of activations that are recomputed, or offloaded
    ("torch", "OptimizedModule"): "_orig_mod",  # torch.compile's
    ("torch", "_PipelineStageBase"): "submod",
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("deepspeed", "InferenceEngine"): "module",
    ("lightning", "_FabricModule"): "_forward_module",
    ("lightning_fabric", "_FabricModule"): "_forward_module",
    ("megatron", "DistributedDataParallel"): "module",
    ("megatron", "TorchFullyShardedDataParallel"): "module",
    ("megatron", "Float16Module"): "module",
    ("apex", "DistributedDataParallel"): "module",
}
_ATTRIBUTES = frozenset(_WRAPPERS.values())
_UNMISTAKABLE = frozenset(attribute for attribute in _ATTRIBUTES if attribute.startswith("_"))


def _attribute_of(kind: type) -> str | None:
    """The attribute in which a wrapper of this class has what it wraps; None for any other class."""
    for base in kind.__mro__:
        found = _WRAPPERS.get((base.__module__.partition(".")[0], base.__name__))
        if found is not None:
            return found
    return None


def is_model(thing: object) -> TypeGuard[nn.Module]:
    """Whether it is a module, or a stage of `torch.distributed.pipelining`, which has one."""
    return isinstance(thing, nn.Module) or _attribute_of(type(thing)) is not None


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps as a whole, what that wraps, and so on; the last is the user's own.

    A stage of `torch.distributed.pipelining`, which is no module, is not among them, but what it has is.

    >>> net = nn.Sequential()
    >>> net.add_module("module", nn.Linear(2, 2))  # a part of the model, whatever it is called
    >>> [module is net for module in unwrapping(nn.DataParallel(net))]
    [False, True]
    """
    while True:
        if isinstance(model, nn.Module):
            yield model
        attribute = _attribute_of(type(model))
        if attribute is None:
            return
        model = getattr(model, attribute)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model."""
    *_, found = unwrapping(model)
    return found


def own_modules(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """The modules by their names in the user's own model, in the order of ``named_modules()``.

    A wrapper inside of the model has the name of what it wraps, and stands before it. One of the whole model is left
    out, with whatever it has of its own, such as the count of an AveragedModel.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] | None = set() if remove_duplicate else None
    _visit(unwrapped(model), "", found, seen, {})
    return found


def _visit(
    module: nn.Module,
    name: str,
    found: list[tuple[str, nn.Module]],
    seen: set[nn.Module] | None,
    attributes: dict[type, str | None],
) -> None:
    """Note a module under its name, and what is in it; ``attributes`` keeps what `_attribute_of` said."""
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    found.append((name, module))
    if not module._modules:
        return
    kind = type(module)
    if kind not in attributes:
        attributes[kind] = _attribute_of(kind)
    attribute = attributes[kind]
    dot = f"{name}." if name else ""
    for part, child in module._modules.items():
        if child is not None:
            _visit(child, name if part == attribute else f"{dot}{part}", found, seen, attributes)


def own_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[Named]:
    """The parameters by their names in the user's own model, as ``named_parameters()`` gives them.

    Where FSDP has left gathered copies in the place of parameters, the parameters: nothing is given back, which all
    ranks would have to do together.
    """
    with known_engine():
        modules = own_modules(model, remove_duplicate=remove_duplicate)
        gathered = any(map(is_gathered, (*unwrapping(model), *(module for _, module in modules))))
        seen: set[torch.Tensor] = set()
        for prefix, module in modules:
            dot = f"{prefix}." if prefix else ""
            for name, param in module._parameters.items():
                if param is None or param in seen:
                    continue
                if remove_duplicate:
                    seen.add(param)
                yield f"{dot}{name}", held_by(param)[1] if gathered else param


def own_buffers(model: nn.Module) -> Iterator[Named]:
    """The persistent buffers by their names in the user's own model; one that is shared under each of its names."""
    with known_engine():
        for prefix, module in own_modules(model, remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{dot}{name}", buffer


def clean_name(name: str) -> str:
    """A name without what only wrappers put into it; a part called ``module`` may be the user's, and stays.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    >>> clean_name("_forward_module.layers.module.weight")
    'layers.module.weight'
    """
    parts = name.split(".")
    return name if _UNMISTAKABLE.isdisjoint(parts) else ".".join(part for part in parts if part not in _UNMISTAKABLE)


def unwrapped_names(name: str) -> list[str]:
    """What a name that was made with wrappers, as in a file, may be in the user's own model; the likeliest first.

    >>> unwrapped_names("module._orig_mod.net.module.weight")
    ['module._orig_mod.net.module.weight', 'module.net.module.weight', 'net.module.weight', 'net.weight']
    """
    found, parts = [name], clean_name(name).split(".")
    while len(parts) > 1 and parts[0] in _ATTRIBUTES:
        found.append(".".join(parts))
        parts = parts[1:]
    inside = [part for part in parts[:-1] if part not in _ATTRIBUTES]
    return list(dict.fromkeys([*found, ".".join(parts), ".".join([*inside, parts[-1]])]))


def named(params: nn.Module | Iterable[torch.Tensor] | Iterable[Named]) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Names, if there are any, and parameters.

    Raises:
        TypeError: something is neither a tensor nor a (name, tensor) pair.
    """
    if is_model(params):
        found = list(own_parameters(params))
        return [name for name, _ in found], [param for _, param in found]
    items: list[Any] = list(params)  # type: ignore[arg-type]  # no module
    kinds = set(map(type, items))
    if kinds == {tuple} and set(map(len, items)) == {2}:
        names, tensors = zip(*items, strict=True)
        return list(map(clean_name, names)), _tensors(tensors, set(map(type, tensors)))
    return None, _tensors(items, kinds)


def _tensors(items: Sequence[Any], kinds: set[type]) -> list[torch.Tensor]:
    wrong = next((kind for kind in kinds if not issubclass(kind, torch.Tensor)), None)
    if wrong is not None:
        raise TypeError(f"params holds a {wrong.__name__}, expected parameters or (name, parameter) pairs")
    return list(items)


def parameter_finder(model: nn.Module | None) -> Callable[[object], torch.Tensor]:
    """A function that gives the parameter of a name; a tensor is given back as it is.

    Args:
        model: where names are looked up; in the attached models unless told.
    """
    known: dict[str, list[torch.Tensor]] = {}

    def find(key: object) -> torch.Tensor:
        if isinstance(key, torch.Tensor):
            return key
        if not isinstance(key, str):
            raise TypeError(f"values has a {type(key).__name__} for a key, expected a parameter or its name")
        if not known:
            for each in (model,) if model is not None else registry.models():
                for name, param in own_parameters(each, remove_duplicate=False):
                    if all(param is not other for other in known.setdefault(name, [])):
                        known[name].append(param)
        found = next((known[name] for name in unwrapped_names(key) if name in known), [])
        if len(found) != 1:
            where = "the model" if model is not None else "the attached models"
            raise InvalidValueError(
                f"'{key}' is the name of {len(found)} parameters of {where}, expected 1: pass model=, or names as "
                "model.named_parameters() gives them"
            )
        return found[0]

    return find


def check_what(what: object) -> str:
    """The quantity's name: ``"value"``, ``"grad"``, ``"lp"`` (the weights that the model computes with), or a state's.

    Raises:
        InvalidValueError: it is not a string.
    """
    if not isinstance(what, str) or not what:
        raise InvalidValueError(f"what is {what!r}, expected 'value', 'grad' or the key of an optimizer state, or 'lp'")
    return what


def check_written(what: object) -> str:
    """The name of a quantity that is to be written.

    Raises:
        InvalidValueError: it is not a string, or ``"lp"``, which follows from the value.
    """
    if what == "lp":
        raise InvalidValueError(
            "what is 'lp', which is only read: write 'value' with refresh_lp=True, and the weights that the model "
            "computes with follow"
        )
    return check_what(what)

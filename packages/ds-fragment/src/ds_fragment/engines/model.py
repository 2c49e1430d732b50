"""Models as users bring them: taken out of what wraps them, with the parameters that are their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ds_fragment.engines import held_by
from ds_fragment.engines.loaded import is_a, is_gathered
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import InvalidValueError
from ds_fragment.record import clean_name, registry

Named = tuple[str, torch.Tensor]

# What wraps a whole model: module and name of the class, and the attribute that has the model.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),  # torch.compile's
    ("deepspeed", "DeepSpeedEngine", "module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
)


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps as a whole, what that wraps, and so on; the last is the user's own.

    >>> net = nn.Sequential()
    >>> net.add_module("module", nn.Linear(2, 2))  # a part of the model, whatever it is called
    >>> [module is net for module in unwrapping(net)]
    [True]
    """
    yield model
    for module, name, attribute in _WRAPPERS:
        if is_a(model, module, name):
            yield from unwrapping(getattr(model, attribute))
            return


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model."""
    *_, found = unwrapping(model)
    return found


def own_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters by their names in the user's own model, as ``named_parameters()`` gives them.

    Where FSDP has left gathered copies in the place of parameters, the parameters: nothing is given back, which all
    ranks would have to do together.
    """
    model = unwrapped(model)
    with known_engine():
        gathered = any(map(is_gathered, model.modules()))
        for name, param in model.named_parameters(remove_duplicate=remove_duplicate):
            yield clean_name(name), held_by(param)[1] if gathered else param


def named(params: nn.Module | Iterable[torch.Tensor] | Iterable[Named]) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Names, if there are any, and parameters.

    Raises:
        TypeError: something is neither a tensor nor a (name, tensor) pair.
    """
    if isinstance(params, nn.Module):
        found = list(own_parameters(params))
        return [name for name, _ in found], [param for _, param in found]
    items: list[Any] = list(params)
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
        found = known.get(clean_name(key), [])
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

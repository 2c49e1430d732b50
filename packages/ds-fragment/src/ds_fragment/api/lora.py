"""The LoRA layers of peft: which parameters make up a merged weight, and its name in the user's own model.

peft itself is never imported. A merged weight is ``W + scaling * B @ A``, summed over the active adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_fragment.engines.loaded import is_a
from ds_fragment.engines.model import own_modules, own_parameters
from ds_fragment.errors import InvalidValueError


@dataclass(frozen=True)
class Delta:
    """What one adapter adds to a weight.

    Attributes:
        a: (rank, in features).
        b: (out features, rank).
        scaling: a factor, ``lora_alpha / r`` or that of rslora.
        transposed: whether the weight is stored as (in features, out features), as Conv1D of transformers does.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Weight:
    """One tensor of the model: a parameter, and what is added to it."""

    name: str
    param: torch.Tensor
    deltas: tuple[Delta, ...] = ()

    @property
    def params(self) -> list[torch.Tensor]:
        """All parameters that it is made of; its own first, then A and B of each adapter."""
        return [self.param, *(factor for delta in self.deltas for factor in (delta.a, delta.b))]

    def merged(self, wholes: Sequence[torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
        """The tensor from the whole of each of `params`; computed in fp32 or wider, and cast once.

        ``dtype`` is what floating-point tensors are cast to, unless None that of the first.
        """
        base, *factors = wholes
        wanted = dtype if dtype is not None and base.is_floating_point() else base.dtype
        if not factors:
            return base.to(wanted)
        wide = torch.promote_types(base.dtype, torch.float32)
        total = base.to(wide)
        for delta, a, b in zip(self.deltas, factors[::2], factors[1::2], strict=True):
            product = b.to(wide) @ a.to(wide)
            total = total + (product.T if delta.transposed else product) * delta.scaling
        return total.to(wanted)


def plain_weights(model: nn.Module) -> list[Weight]:
    """Every parameter by its name in the user's own model; tied ones once."""
    return [Weight(name, param) for name, param in own_parameters(model)]


def merged_weights(model: nn.Module) -> list[Weight]:
    """The weights of the model that was given to peft, by its names there, each with what its LoRA layers add.

    Raises:
        InvalidValueError: a layer of peft's cannot be merged exactly; the message names it.
    """
    everything = dict(own_parameters(model, remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, param in everything.items():
        names_of.setdefault(id(param), []).append(name)
    modules = own_modules(model)
    layers = {name: module for name, module in modules if is_a(module, *_TUNER_LAYER)}
    saved = {name: module for name, module in modules if is_a(module, *_WRAPPER)}
    prefixes = _prefixes(modules)
    found, seen = list[Weight](), set[int]()
    for name, param in everything.items():
        own = _own_name(name, layers, saved)
        if own is None:
            continue
        layer = own.removesuffix(".weight")
        deltas: tuple[Delta, ...] = ()
        if layer in layers and name == f"{layer}.base_layer.weight":
            deltas = tuple(_deltas(layer, layers[layer], everything))
            if deltas and len(names_of[id(param)]) > 1:
                raise InvalidValueError(
                    f"the LoRA layer '{layer}' cannot be merged: its weight is tied, as {names_of[id(param)]}, and the "
                    "delta is of one of them only; untie the weights, or pass merge_lora=False"
                )
        if id(param) in seen:
            continue
        seen.add(id(param))
        for prefix, before in prefixes.items():
            if own.startswith(prefix):
                own = before + own.removeprefix(prefix)
        found.append(Weight(own, param, deltas))
    return found


_TUNER_LAYER = ("peft.tuners.tuners_utils", "BaseTunerLayer")
_WRAPPER = ("peft.utils.other", "AuxiliaryTrainingWrapper")
_SAVED = ("peft.utils.other", "ModulesToSaveWrapper")


def _prefixes(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    """What each PeftModel puts before the names of the model that it was given, and what stands there without it."""
    found = {}
    for name, module in modules:
        if is_a(module, "peft", "PeftModel"):
            outer: Any = module
            if not is_a(outer.base_model, "peft.tuners.tuners_utils", "BaseTuner"):
                raise InvalidValueError(
                    f"merge_lora is True, and the model has prompts of peft's (in '{name}'), which are no part of any "
                    "weight: pass merge_lora=False"
                )
            before = f"{name}." if name else ""
            found[f"{before}base_model.model."] = before
    return found


def _own_name(name: str, layers: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> str | None:
    """A parameter's name without what peft's layers put into it; None for what merging leaves out."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):  # the innermost layer of peft's that it is in
        inside, rest = ".".join(parts[:at]), parts[at:]
        if inside in layers:
            return f"{inside}.{'.'.join(rest[1:])}" if rest[0] == "base_layer" else None
        if inside in saved:
            return _saved_name(inside, saved[inside], rest)
    return name


def _saved_name(inside: str, wrapper: Any, rest: Sequence[str]) -> str | None:
    """The name of a parameter in a module of ``modules_to_save``; None for the copy that is not in use."""
    if not is_a(wrapper, *_SAVED):
        raise InvalidValueError(
            f"'{inside}' is a {type(wrapper).__name__} of peft, which cannot be merged exactly here: pass "
            "merge_lora=False, or call merge_and_unload()"
        )
    active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
    used = ["modules_to_save", *active[:1]] if active else ["original_module"]
    return f"{inside}.{'.'.join(rest[len(used) :])}" if list(rest[: len(used)]) == used else None


def _deltas(name: str, layer: Any, params: Mapping[str, torch.Tensor]) -> Iterator[Delta]:
    """What the active adapters of a layer add to its weight, but for what is merged into it already."""
    for adapter in layer.active_adapters:
        why = _inexact(layer, adapter)
        if why:
            raise InvalidValueError(
                f"the layer '{name}' cannot be merged exactly: {why}; pass merge_lora=False, or merge it with peft"
            )
        if adapter in layer.lora_A and adapter not in layer.merged_adapters:
            a, b = (params[f"{name}.{factor}.{adapter}.weight"] for factor in ("lora_A", "lora_B"))
            yield Delta(a, b, float(layer.scaling[adapter]), bool(getattr(layer, "fan_in_fan_out", False)))


def _inexact(layer: Any, adapter: str) -> str:
    """Why an adapter of a layer is not ``scaling * B @ A``; empty where it is."""
    kind = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("peft."))  # FSDP2 makes a subclass
    if not is_a(layer, "peft.tuners.lora.layer", "Linear") or kind.__name__ != "Linear":
        return f"it is a {kind.__name__} of {kind.__module__}, and only LoRA of linear layers is merged"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return f"its adapter '{adapter}' is a {getattr(variant, '__name__', type(variant).__name__)}"
    for option, words in (("use_dora", "DoRA"), ("lora_bias", "lora_bias=True")):
        if getattr(layer, option, {}).get(adapter, False):
            return f"its adapter '{adapter}' has {words}"
    return ""

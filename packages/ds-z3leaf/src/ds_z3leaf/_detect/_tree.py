"""The modules of a model with their parents, as they are below adapters and wrappers.

[Note: wrappers] An adapter layer (peft's have ``adapter_layer_names``) holds the layer that it adapts as
``base_layer``, peft's trained copies hold theirs as ``original_module``; `torch.compile`, activation checkpointing and
FSDP1 have words of their own. A wrapper adds a level and changes nothing of the module in it. Adapters are set aside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ds_z3leaf._sizes import full_shape

_ADAPTED = ("base_layer", "original_module")
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WORDS = frozenset((*_ADAPTED, *_WRAPPED))
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
Shape = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A module at its place in the model.

    Attributes:
        name: its full name; "" is the model.
        word: the last part of the name.
        module: the module.
        parent: the module that holds it; None for the model.
        inside: whether it is, or is in, a block that was found; those below it are in one too.
    """

    name: str
    word: str
    module: nn.Module
    parent: Node | None
    inside: bool = False

    def above(self) -> Iterator[Node]:
        """The node itself and those that hold it, wrappers left out."""
        node: Node | None = self
        while node is not None:
            if wrapped(node.module) is None:
                yield node
            node = node.parent

    def up_to(self, last: Node | None) -> Iterator[Node]:
        """The node itself and those that hold it, up to one of them, or all."""
        node: Node | None = self
        while node is not None:
            yield node
            node = None if node is last else node.parent

    def below(self, holder: Node) -> list[str]:
        """The words that lead from a holder to this node, without those of wrappers."""
        words: list[str] = []
        node: Node = self
        while node is not holder and node.parent is not None:
            if not (node.word in _WORDS and wrapped(node.parent.module)):
                words.append(node.word)
            node = node.parent
        return words[::-1]

    def at_plain_name(self, words: tuple[str, ...] = _ADAPTED) -> Node:
        """The outermost adapter around this node, which has the name that the module has without adapters."""
        node = self
        while node.word in words and node.parent is not None and wrapped(node.parent.module) is node.module:
            node = node.parent
        return node

    def called(self) -> str:
        """The word for this node, wrappers left out: what is called ``experts.base_layer`` is called ``experts``."""
        return self.at_plain_name((*_ADAPTED, *_WRAPPED)).word


def walk(model: nn.Module) -> Iterator[Node]:
    """All modules in the order of ``named_modules()``, each once, adapters' own modules left out."""
    seen: set[int] = set()
    stack = [Node("", "", model, None)]
    while stack:
        node = stack.pop()
        if id(node.module) in seen:
            continue
        seen.add(id(node.module))
        yield node
        inner = wrapped(node.module)
        prefix = f"{node.name}." if node.name else ""
        stack.extend(
            Node(prefix + word, word, child, node)
            for word, child in reversed(node.module._modules.items())
            if child is not None and (inner is None or child is inner)
        )


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper or an adapter layer is around; None for other modules."""
    children = module._modules
    if _WORDS.isdisjoint(children.keys()):  # iterating over the children of a ScriptModule fails
        return None
    for word in _WRAPPED:
        if (inner := children.get(word)) is not None:
            return inner
    if (inner := children.get("base_layer")) is not None and hasattr(module, "adapter_layer_names"):
        return inner
    return children.get("original_module") if "modules_to_save" in children else None


def peel(module: nn.Module) -> nn.Module:
    """The module without the wrappers around it."""
    while (inner := wrapped(module)) is not None:
        module = inner
    return module


def is_container(module: nn.Module) -> bool:
    """Whether the module is a list, a dictionary or a sequence of modules."""
    return isinstance(module, _CONTAINERS)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was before FSDP2, which makes a class FSDPName of a class Name."""
    kind = type(module)
    bases = kind.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__name__ == "FSDPModule" else kind


def of_torch(module: nn.Module) -> bool:
    """Whether the class is one of torch's own layers."""
    return class_of(module).__module__.startswith("torch.nn.modules.")


def shape_of(param: nn.Parameter) -> Shape:
    """The shape before sharding and before 4-bit packing; () where there is none yet."""
    if isinstance(param, nn.parameter.UninitializedParameter):
        return ()
    packed = getattr(param, "quant_state", None)
    return tuple(getattr(packed, "shape", None) or full_shape(param))


def own_shapes(module: nn.Module, *, buffers: bool = False) -> dict[str, Shape]:
    """The shapes of a module's own parameters, adapters' left out; of its buffers too if asked."""
    shapes = {
        name: shape_of(param)
        for name, param in module._parameters.items()
        if param is not None and not name.startswith("lora_")
    }
    if buffers:
        shapes |= {name: tuple(buffer.shape) for name, buffer in module._buffers.items() if buffer is not None}
    return shapes


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, also of quantised ones, whose weights have other shapes."""
    known = module.__dict__
    inputs = known.get("in_features", known.get("infeatures"))
    outputs = known.get("out_features", known.get("outfeatures"))
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: Dropout, Identity and norms do not."""
    return any(
        linear_widths(part) is not None or any(len(shape) > 1 for shape in own_shapes(part).values())
        for part in module.modules()
    )


def signature(module: nn.Module) -> tuple[object, ...]:
    """What two modules that compute alike have in common: the shapes of the weights, whatever adapts or packs them."""
    module = peel(module)
    widths = linear_widths(module)
    if widths is not None:
        return widths
    own = tuple(sorted(shape for shape in own_shapes(module).values() if math.prod(shape) > 0))
    return (*own, *(inner for child in module._modules.values() if child is not None and (inner := signature(child))))

"""Find what chooses among experts: something with as many outputs as there are experts, or a router by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import nn

from ds_z3leaf._detect._experts import Experts
from ds_z3leaf._detect._tree import Node, Shape, class_of, linear_widths, of_torch, own_shapes, peel, shape_of, wrapped

# `gate_proj` and `gate_up_proj` are parts of a gated MLP, no routers.
_ROUTER = re.compile(
    r"rout(er|ing)|gating|gater|dispatch|selector|(^|_)(gates?|switch|wg)(_\d+)?$|^gate_?(fn|net|network|linear|layer"
    r"|weights?|kernel|func|module|logits|mlp)(_|$)|(^|_)switch(_|$)",
    re.I,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PARTS = 24  # of a router that are looked at


@dataclass(frozen=True)
class Router:
    """What chooses among experts.

    Attributes:
        word: its name in the block, dotted.
        width: its number of outputs; None where that cannot be read.
        named: whether its name says router.
        fits: whether it has as many outputs as there are experts.
    """

    word: str
    width: int | None
    named: bool
    fits: bool


def routers_of(block: Node, experts: Experts) -> Iterator[Router]:
    """What could be the router of these experts in a block, the likeliest first."""
    found = list(_direct(block, experts))
    found += [router for router in _inner(block, experts) if router.named and router.fits]
    yield from sorted(found, key=lambda router: (not (router.named and router.fits), not router.named))


def says_router(word: str) -> bool:
    """Whether a name is one that routers have."""
    return bool(_ROUTER.search(_CAMEL.sub("_", word)))


def _direct(block: Node, experts: Experts) -> Iterator[Router]:
    """Children and parameters of the block."""
    for word, child in block.module._modules.items():
        if child is not None and _is_other(block, word, child, experts):
            yield from _as_router(word, peel(child), experts)
    for word, param in block.module._parameters.items():
        if param is None or "bias" in word or (block is experts.node and word in experts.words):
            continue
        # Beside the experts' weights lie other weights of as many rows: only a name tells the router from them.
        if block is not experts.node or experts.members or says_router(word):
            yield from _of_shape(word, shape_of(param), experts)


def _inner(block: Node, experts: Experts) -> Iterator[Router]:
    """Children of the block's children."""
    for word, child in block.module._modules.items():
        if child is None or not _is_other(block, word, child, experts) or isinstance(child, nn.ModuleList):
            continue
        for inner, grandchild in peel(child)._modules.items():
            if grandchild is not None and says_router(inner):
                yield from _as_router(f"{word}.{inner}", peel(grandchild), experts)


def _is_other(block: Node, word: str, child: nn.Module, experts: Experts) -> bool:
    """Whether a child of the block neither is nor holds the experts."""
    if block is experts.node:
        return word not in experts.words if experts.words else False
    return all(node.module is not child for node in experts.node.up_to(block))


def _as_router(word: str, module: nn.Module, experts: Experts) -> Iterator[Router]:
    named = says_router(word.rpartition(".")[2]) or says_router(class_of(module).__name__)
    if not named:
        width = _last_width(module)
        if width is not None and experts.fits(width):
            yield Router(word, width, False, True)
        return
    widths = list(_widths(module))
    fitting = [width for width in widths if experts.fits(width)]
    if fitting:
        yield Router(word, fitting[-1], True, True)
    elif widths:
        yield Router(word, widths[-1], True, False)
    elif not of_torch(module):
        yield Router(word, None, True, False)


def _of_shape(word: str, shape: Shape, experts: Experts) -> Iterator[Router]:
    named = says_router(word)
    if len(shape) != 2:
        return
    fitting = [width for width in (shape if named else shape[:1]) if experts.fits(width)]
    if fitting:
        yield Router(word, fitting[0], named, True)
    elif named:
        yield Router(word, shape[0], True, False)


def _widths(module: nn.Module) -> Iterator[int]:
    """Output widths of the linear layers, convolutions and matrices in a router."""
    for part in islice(module.modules(), _PARTS):
        linear = linear_widths(part)
        channels = part.__dict__.get("out_channels")
        if linear is not None:
            yield linear[1]
        elif isinstance(channels, int):
            yield channels
        elif wrapped(part) is None:
            yield from (width for shape in own_shapes(part).values() if len(shape) == 2 for width in shape[::-1])


def _last_width(module: nn.Module) -> int | None:
    """The output width of a linear layer, or of the last one in a small network."""
    if isinstance(module, nn.Embedding):
        return None
    widths: int | None = None
    for index, part in enumerate(module.modules()):
        if index >= _PARTS:
            return None
        linear = linear_widths(part)
        if linear is not None:
            widths = linear[1]
        elif not of_torch(part):
            widths = next((shape[0] for shape in own_shapes(part).values() if len(shape) == 2), widths)
    return widths

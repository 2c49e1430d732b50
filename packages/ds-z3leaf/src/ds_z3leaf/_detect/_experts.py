"""Where a module holds several experts: as modules, as one parameter, or as numbered parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from ds_z3leaf._detect._tree import Node, class_of, has_weights, is_container, linear_widths, of_torch, own_shapes, peel

_EXPERT = re.compile(r"expert", re.I)
_MIXTURE = re.compile(r"expert|moe|mixture", re.I)
_NUMBERED = re.compile(r"(.*?)_?(\d+)")
_SHARED = re.compile(r"shared|gate|rout|norm|proj|experts$", re.I)  # shared_expert, expert_gate
_HOLDERS = 2  # levels between a module called experts and what holds them: experts.mlp, experts.deepspeed_experts


@dataclass(frozen=True)
class Experts:
    """Several experts that one module holds.

    Attributes:
        node: the module that holds them.
        words: the parts of it that are experts: names of children or of parameters; empty for all of its children.
        count: how many there are; None where experts are rows of one matrix and only the router knows.
        most: `count` and the helpers beside them, which a router may choose as experts that compute nothing.
        named: whether a name says experts.
        exact: whether only a router by name with as many outputs counts.
        unsure: whether only a source that routes makes experts of them.
        text: what they are, such as "8 experts of class MLP".
        members: the experts' modules; empty for parameters.
        rows: the rows of the matrix where `count` is None.
    """

    node: Node
    words: tuple[str, ...]
    count: int | None
    most: int
    named: bool
    text: str
    members: list[nn.Module] = field(default_factory=list)
    rows: int = 0
    exact: bool = False
    unsure: bool = False

    def fits(self, width: int) -> bool:
        """Whether a router with this many outputs chooses among these experts."""
        if self.count is None:
            return 1 < width < self.rows and self.rows % width == 0
        return width > 1 and self.count <= width <= self.most

    def where(self, block: Node) -> str:
        """The experts' place in a block, dotted."""
        words = self.node.below(block)
        if self.words:
            words.append(self.words[0] if len(self.words) == 1 else f"{self.words[0]}..{self.words[-1]}")
        return ".".join(words)


def says_mixture(node: Node) -> bool:
    """Whether the name or the class of a module says that it is a mixture of experts."""
    return bool(_MIXTURE.search(node.called()) or _MIXTURE.search(class_of(node.module).__name__))


def says_mixture_class(node: Node) -> bool:
    """Whether a module's class is called a mixture, not just experts."""
    return bool(re.search(r"moe|mixture", class_of(node.module).__name__, re.I))


def experts_of(node: Node) -> Iterator[Experts]:
    """The groups of experts, or of what could be experts, that a module holds itself."""
    module = node.module
    if is_container(module):
        yield from _listed(node)
    elif not of_torch(module):
        yield from _numbered_children(node)
        yield from _alike_children(node)
    if not of_torch(module) or isinstance(module, nn.ParameterList):
        yield from _in_parameters(node)


def _listed(node: Node) -> Iterator[Experts]:
    children = [child for child in node.module._modules.values() if child is not None]
    if len(children) < 2:
        return
    named = _says_experts(node)
    if isinstance(node.module, nn.Sequential) and not _MIXTURE.search(node.called()):
        return  # a stack, or the parts of one expert
    if made := _of_modules(node, (), children, named):
        yield made


def _numbered_children(node: Node) -> Iterator[Experts]:
    """Groups of children that have one name and a number."""
    if len(node.module._modules) < 2:
        return
    groups: dict[str, list[str]] = {}
    for word, child in node.module._modules.items():
        if child is not None and (match := _NUMBERED.fullmatch(word)):
            groups.setdefault(match[1], []).append(word)
    each = [word for word in node.module._modules if _EXPERT.search(word) and not _SHARED.search(word)]
    if len(each) > 1 and not any(_NUMBERED.fullmatch(word) for word in each):
        groups["expert"] = each  # text_expert and vision_expert
    for prefix, words in groups.items():
        if len(words) < 2:
            continue
        children = [child for word in words if (child := node.module._modules[word]) is not None]
        named = bool(_EXPERT.search(prefix)) or (not prefix and _says_experts(node))
        if made := _of_modules(node, tuple(words), children, named):
            yield made


def _alike_children(node: Node) -> Iterator[Experts]:
    """Children of one class under any names, such as left and right."""
    groups: dict[type[nn.Module], list[str]] = {}
    for word, child in node.module._modules.items():
        if child is not None:
            groups.setdefault(class_of(peel(child)), []).append(word)
    for words in groups.values():
        children = [child for word in words if (child := node.module._modules[word]) is not None]
        if len(words) > 1 and (made := _of_modules(node, tuple(words), children, named=False)):
            yield replace(made, named=False, unsure=True)


def _of_modules(node: Node, words: tuple[str, ...], children: list[nn.Module], named: bool) -> Experts | None:
    members = [child for child in children if has_weights(child)]
    named = named and len(children) > 1
    if len(members) < (1 if named else 2):
        return None
    classes = sorted({class_of(peel(member)).__name__ for member in members})
    kinds = f"class {classes[0]}" if len(classes) == 1 else f"classes {', '.join(classes[:3])}"
    text = f"{len(members)} experts of {kinds}"
    if len(children) > len(members):
        text += f" (and {len(children) - len(members)} without weights)"
    named = named or all(_EXPERT.search(name) for name in classes)
    return Experts(node, words, len(members), len(children), named, text, members)


def _in_parameters(node: Node) -> Iterator[Experts]:
    module = node.module
    held = _says_experts(node) or says_mixture(node)
    if linear_widths(module) is not None or not (module._parameters or (held and module._buffers)):
        return
    around = node.parent is not None and says_mixture(node.parent)
    shapes = own_shapes(module, buffers=held)
    yielded: set[int] = set()
    for name, shape in shapes.items():
        if len(shape) in (3, 4) and shape[0] > 1 and shape[0] not in yielded:
            yielded.add(shape[0])
            named = held or around or bool(_MIXTURE.search(name))
            text = f"{shape[0]} experts fused"
            yield Experts(node, (name,), shape[0], shape[0], named, text, exact=not held and around)
    yield from _numbered_parameters(node, shapes)
    if _says_experts(node) and not yielded:
        for name, shape in shapes.items():
            if len(shape) == 2 and shape[0] > 2:
                yield Experts(node, (name,), None, 0, True, "experts stacked", rows=shape[0])


def _numbered_parameters(node: Node, shapes: dict[str, tuple[int, ...]]) -> Iterator[Experts]:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and (match := _NUMBERED.fullmatch(name)):
            groups.setdefault((match[1], shape), []).append(name)
    for (prefix, _), names in groups.items():
        if len(names) > 1:
            named = _says_experts(node) or bool(_MIXTURE.search(prefix))
            text = f"{len(names)} experts as parameters"
            yield Experts(node, tuple(names), len(names), len(names), named, text, exact=True)


def _says_experts(node: Node) -> bool:
    """Whether a module, or one that holds it a level or two up, is called experts."""
    if _MIXTURE.search(node.called()) and not says_stack(node.called()):
        return True
    for level, holder in enumerate(node.above()):
        if level > _HOLDERS:
            return False
        if _EXPERT.search(holder.called()) or _EXPERT.search(class_of(holder.module).__name__):
            return True
    return False


_STACK = re.compile(r"(^|_)(layers?|blocks?|h|stages?|stack|encoders?|decoders?|levels?|resnets|attentions)$", re.I)


def says_stack(word: str) -> bool:
    """Whether a name is one that stacks of layers have."""
    return bool(_STACK.search(word))

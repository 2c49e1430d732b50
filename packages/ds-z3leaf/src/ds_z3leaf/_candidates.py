"""Find the mixture-of-experts blocks of a model, which are what leaf modules are for, and say why each is one.

A block is a module that routes: its ranks use different experts in different order, so it must be gathered whole.
Every module that holds several experts is a lead (`_detect._experts`). The block is the smallest module that holds
them and their router (`_detect._router`), so that a plain stack of layers is never one. Names help; where there are
none, the source of the block's forward has to route (`_detect._routing`). At last the block moves up until it is a
module that is called, and called on every rank (`_detect._calls`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ds_z3leaf._detect._calls import cannot_be_called, condition_of_call, holder_of, other_use
from ds_z3leaf._detect._experts import Experts, experts_of, says_mixture, says_mixture_class, says_stack
from ds_z3leaf._detect._router import Router, routers_of
from ds_z3leaf._detect._routing import chooses, is_stack, picks_by_argument, picks_by_data, uses
from ds_z3leaf._detect._source import Sources
from ds_z3leaf._detect._tree import Node, class_of, is_container, signature, walk
from ds_z3leaf._plan import LeafCandidate
from ds_z3leaf._walk import check_model

_LEVELS = 4  # from the module that holds the experts up to the one that holds the router
_HEADS = frozenset({"head", "lm_head", "score", "classifier", "fc", "out", "output", "proj", "cls", "logits"})


def find_leaf_candidates(model: nn.Module) -> list[LeafCandidate]:
    """The mixture-of-experts blocks of a model, outermost ones only. Changes nothing, reads no parameter's values.

    Args:
        model: any model; parameters may be on meta, sharded by FSDP2 or partitioned by ZeRO-3.

    Returns:
        The candidates in the order of ``named_modules()``; flag them by
        ``mark_leaves(model, modules=[candidate.module for candidate in find_leaf_candidates(model)])``.

    Raises:
        LeafTypeError: `model` is no module.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router = nn.Linear(4, 2)
    ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    ...     def forward(self, x):
    ...         return self.experts[self.router(x).sum(0).argmax()](x)
    >>> print(*find_leaf_candidates(nn.Sequential(nn.Linear(4, 4), Block())))
    1 (Block): 2 experts of class Linear in 'experts', router 'router' with 2 outputs
    """
    return [candidate for candidate, _ in find_mixtures(model)]


def find_mixtures(model: nn.Module) -> list[tuple[LeafCandidate, list[nn.Module]]]:
    """The candidates, each with those of its experts that are modules of their own; none where they are fused.

    Raises:
        LeafTypeError: `model` is no module.
    """
    check_model(model)
    sources = Sources()
    found: dict[int, tuple[Node, str, list[nn.Module]]] = {}
    order: dict[int, int] = {}
    for index, node in enumerate(walk(model)):
        order[id(node.module)] = index
        node.inside = node.inside or (node.parent is not None and node.parent.inside)
        if node.inside:
            continue
        for block, reason, members in _blocks(node, sources):
            found[id(block.module)] = block, reason, members
            # What is yet to come of the block lies below these.
            for holder in node.up_to(block):
                holder.inside = True
            break
    outermost = [
        (block, reason, members)
        for block, reason, members in found.values()
        if not any(id(holder.module) in found for holder in block.up_to(None) if holder is not block)
    ]
    outermost.sort(key=lambda entry: order[id(entry[0].module)])
    return [(LeafCandidate.of(block.name, block.module, reason), members) for block, reason, members in outermost]


def _blocks(node: Node, sources: Sources) -> Iterator[tuple[Node, str, list[nn.Module]]]:
    """The blocks whose experts a module holds, with the reasons and the experts."""
    for experts in experts_of(node):
        found = _block_of(experts, sources)
        if found is None:
            continue
        first, holder, router = found
        block, moves = _raise_to_called(first, sources)
        if block is not None:
            reason = "; ".join([_because(block, experts, holder, router), *moves])
            yield block.at_plain_name(), reason, experts.members


def _block_of(experts: Experts, sources: Sources) -> tuple[Node, Node, Router | None] | None:
    """The smallest module that holds the experts and their router, the module that holds the router, and the router."""
    for level, holder in enumerate(experts.node.above()):
        if level > (_LEVELS if experts.named else 1):
            break
        if isinstance(holder.module, nn.ModuleList):
            continue
        for router in routers_of(holder, experts):
            if _belong(holder, experts, router, level, sources):
                return _below_stack(experts.node, holder), holder, router
    block = _without_router(experts, sources)
    return None if block is None else (block, block, None)


def _below_stack(node: Node, holder: Node) -> Node:
    """What holds a router that a stack of blocks shares is too much: the block is the one in the stack."""
    inner = [part for part in node.up_to(holder) if part is not node and part is not holder]
    stack = next((part for part in inner if is_container(part.module)), None)
    if stack is None:
        return holder
    return next(part for part in node.up_to(holder) if part.parent is stack)


def _because(block: Node, experts: Experts, holder: Node, router: Router | None) -> str:
    text = f"{router.width} {experts.text}" if experts.count is None and router is not None else experts.text
    where = f"{text} in {experts.where(block)!r}"
    if router is None:
        return f"{where}, chosen in its forward without a router"
    inside = any(part is block for part in holder.up_to(None))
    word = ".".join([*holder.below(block), router.word]) if inside else f"{holder.name}.{router.word}".lstrip(".")
    outputs = f" with {router.width} outputs" if router.width else ""
    return f"{where}, router {word!r}{'' if inside else ' of the model'}{outputs}"


def _belong(block: Node, experts: Experts, router: Router, level: int, sources: Sources) -> bool:
    """Whether these experts are chosen by this router.

    Experts by name take a router by name, or anything near with as many outputs. Others must be alike, in the block
    itself, not called one after another, and take a router by name with as many outputs, or have a source that routes.
    """
    if experts.named:
        if router.named:
            if router.fits:
                return True
            return experts.count is not None and not experts.exact and router.width != 1 and _alike(experts)
        return router.fits and not experts.exact and level <= 2
    words = _words_in(block, experts)
    if not (router.fits and words and _alike(experts)):
        return False
    if sources.ask(chooses, block.module, router.word.split(".")[0], words):
        return True
    if experts.unsure:
        return False
    told = router.named or (says_mixture(block) and router.word not in _HEADS)
    stack = any(says_stack(word) or sources.ask(is_stack, block.module, word) for word in words)
    return told and bool(experts.members) and not stack


def _words_in(block: Node, experts: Experts) -> tuple[str, ...]:
    """The attributes of a block that are the experts or hold them; none if they are further down."""
    if experts.node is block:
        return experts.words
    words = experts.node.below(block)
    return tuple(words) if len(words) == 1 else ()


def _alike(experts: Experts) -> bool:
    return len({signature(member) for member in experts.members}) <= 1


def _without_router(experts: Experts, sources: Sources) -> Node | None:
    """The block of experts that are chosen without a router of their own, such as by a hash or by an argument."""
    if experts.unsure or not experts.members:
        return None
    for level, block in enumerate(experts.node.above()):
        if level > (2 if experts.named else 1):
            break
        words = ("self",) if block is experts.node and not experts.words else _words_in(block, experts)
        if not words:
            continue
        if experts.named:
            told = sources.ask(picks_by_data, block.module, words) or _only_names_tell(block, words, sources)
        else:
            told = sources.ask(picks_by_argument, block.module, words)
        if told and _alike(experts):
            return block
    return None


def _only_names_tell(block: Node, words: tuple[str, ...], sources: Sources) -> bool:
    """Whether a block that holds experts is a mixture by its class, and its forward does not show what it does."""
    if type(block.module).forward is nn.Module.forward:
        return False
    source = sources.of(block.module)
    return source.forward is None or (says_mixture_class(block) and not sources.ask(uses, block.module, words))


def _raise_to_called(block: Node, sources: Sources) -> tuple[Node | None, list[str]]:
    """The block, or the module around it that is called on every rank, and why; None if nothing can be called."""
    moves: list[str] = []
    while True:
        why = cannot_be_called(block.module, sources.of(block.module))
        above = holder_of(block)
        if above is None:
            return (None if why and is_container(block.module) else block), moves
        parent, word, listed = above
        if why is None and (use := sources.ask(other_use, parent.module, word, listed)):
            why = f"its forward is never called: {class_of(parent.module).__name__} {use}"
        if why is None and not listed and (condition := sources.ask(condition_of_call, parent.module, word)):
            why = f"whether it is called depends on {condition}"
        if why is None:
            return block, moves
        moves.append(f"not {block.called()!r} alone: {why}")
        block = parent

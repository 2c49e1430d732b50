"""The two flags that DeepSpeed reads, and nothing else.

[Note: flags] ``module._z3_leaf`` makes ZeRO-3 gather a module's parameters as one unit and put no hooks below it.
``param.ds_z3_leaf_module`` is the leaf that a parameter belongs to, the outermost one where leaves are nested; ZeRO-3
reduces the gradients of such a parameter when the leaf's backward is done, used or not.
"""

from __future__ import annotations

from torch import nn

FLAG, OWNER = "_z3_leaf", "ds_z3_leaf_module"


def is_leaf(module: object) -> bool:
    """Whether a module is flagged."""
    return bool(getattr(module, FLAG, False))


def never_called(module: nn.Module) -> bool:
    """Whether a module is a mere container without a ``forward``, so that hooks on it never run."""
    return getattr(module.forward, "__func__", None) is nn.Module.forward


def set_flag(module: nn.Module, flag: bool) -> None:
    """Flag one module, or take its flag away as if it had never had one; keep the parameters' owners in step."""
    if flag:
        setattr(module, FLAG, True)
        _own(module)
        return
    module.__dict__.pop(FLAG, None)
    if is_leaf(module):  # the class itself says so
        setattr(module, FLAG, False)
    for param in module.parameters():
        if getattr(param, OWNER, None) is module:
            delattr(param, OWNER)
    for leaf in outermost_leaves(module):
        _own(leaf)


def outermost_leaves(model: nn.Module) -> list[nn.Module]:
    """The flagged modules that are inside no other flagged one, in the order of ``modules()``."""
    leaves: dict[int, nn.Module] = {}
    stack = [model]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if is_leaf(module):
            leaves[id(module)] = module
        else:
            stack.extend(reversed(list(module.children())))
    return list(leaves.values())


def _own(leaf: nn.Module) -> None:
    """Make a leaf the owner of its parameters, unless it is inside their owner."""
    inside: dict[int, bool] = {}  # by owner: is the leaf inside it?
    for param in leaf.parameters():
        owner = getattr(param, OWNER, None)
        if isinstance(owner, nn.Module) and is_leaf(owner) and owner is not leaf:
            if id(owner) not in inside:
                inside[id(owner)] = any(module is leaf for module in owner.modules())
            if inside[id(owner)]:
                continue
        setattr(param, OWNER, leaf)

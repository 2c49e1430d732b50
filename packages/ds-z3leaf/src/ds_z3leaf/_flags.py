"""The two flags that DeepSpeed reads, and why a module is flagged.

[Note: flags] ``module._z3_leaf`` makes ZeRO-3 gather a module's parameters as one unit and put no hooks below it.
``param.ds_z3_leaf_module`` is the leaf that a parameter belongs to, the outermost one where leaves are nested; ZeRO-3
reduces the gradients of such a parameter when the leaf's backward is done, used or not. ``module._ds_leaf_reason`` is
ours: a line that says why.
"""

from __future__ import annotations

from torch import nn

from ds_z3leaf._walk import wrapped_module

FLAG, OWNER, REASON = "_z3_leaf", "ds_z3_leaf_module", "_ds_leaf_reason"


def is_leaf(module: object) -> bool:
    """Whether a module is flagged."""
    if isinstance(module, nn.Module) and type(module).__getattr__ is nn.Module.__getattr__:
        # nn.Module.__getattr__ takes a microsecond to find nothing.
        own = module.__dict__.get(FLAG)
        return bool(getattr(type(module), FLAG, False) if own is None else own)
    return bool(getattr(module, FLAG, False))  # wrappers answer for the module inside


def never_called(module: nn.Module) -> bool:
    """Whether a module is a mere container without a ``forward``, so that hooks on it never run."""
    return getattr(module.forward, "__func__", None) is nn.Module.forward


def flag_home(module: nn.Module) -> nn.Module:
    """The module that holds the flag: `torch.compile`'s wrapper reads and writes that of the module inside."""
    while FLAG not in module.__dict__ and type(module).__getattr__ is not nn.Module.__getattr__:
        inner = wrapped_module(module)
        if inner is None or not is_leaf(inner):
            break
        module = inner
    return module


def set_flag(module: nn.Module, flag: bool, reason: str | None = None) -> None:
    """Flag one module, or take its flag away as if it had never had one; keep the parameters' owners in step."""
    if flag:
        setattr(module, FLAG, True)
        if reason is not None:
            setattr(module, REASON, reason)
        _own(module)
        return
    drop_flag(module)
    for param in module.parameters():
        if getattr(param, OWNER, None) is module:
            delattr(param, OWNER)
    for leaf in outermost_leaves(module):
        _own(leaf)


def drop_flag(module: nn.Module) -> None:
    """Take the flag and the reason away from a module, and leave the parameters as they are."""
    home = flag_home(module)
    home.__dict__.pop(FLAG, None)
    home.__dict__.pop(REASON, None)
    if is_leaf(module):  # the class itself says so
        setattr(module, FLAG, False)


def reason_of(leaf: nn.Module) -> str:
    """Why a module is flagged."""
    return str(getattr(leaf, REASON, "flagged, reason unknown"))


def outermost_leaves(model: nn.Module, also: frozenset[int] = frozenset()) -> list[nn.Module]:
    """The modules that are flagged, or have one of these ids, and that can be reached without passing another one.

    They come in the order of ``modules()``.
    """
    leaves: dict[int, nn.Module] = {}
    stack = [model]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if id(module) in also or is_leaf(module):
            leaves[id(module)] = module
        elif module._modules:
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)
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

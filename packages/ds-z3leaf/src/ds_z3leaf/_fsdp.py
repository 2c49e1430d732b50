"""The same choice applied to FSDP2: every leaf is one ``fully_shard`` unit."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ds_z3leaf._flags import never_called, outermost_leaves
from ds_z3leaf._select import check_model, select_modules
from ds_z3leaf._unused import reduce_unused
from ds_z3leaf.errors import LeafNotFoundError, LeafShardError, LeafTypeError


def fully_shard_leaves(
    model: nn.Module,
    leaves: nn.Module | Iterable[nn.Module] | None = None,
    *,
    reduce_scatter_unused_params: bool = True,
    **fully_shard_kwargs: Any,
) -> list[nn.Module]:
    """Make each leaf one FSDP2 unit, and have it reduce the gradients of experts that this rank did not use.

    FSDP2 gathers and reduces unit by unit. With a unit for each expert, ranks that use different experts wait for each
    other for ever; with one unit for the block they do not, if every rank also sends zeros for what it did not use.
    Call it before ``fully_shard`` on the layers and the model around, which then leave the leaves alone.

    Args:
        model: the model.
        leaves: the modules to shard; those that are flagged when left out. Leaves inside other leaves go with them.
        reduce_scatter_unused_params: send zeros for parameters without a gradient. Only turn it off if every rank uses
            every parameter in every step.
        fully_shard_kwargs: given to `torch.distributed.fsdp.fully_shard` (``mesh``, ``mp_policy``, ...).

    Returns:
        The units, in the order of ``model.modules()``. All ranks of the mesh must call it, with the same leaves.

    Raises:
        LeafTypeError: `model` or a leaf is no module, or a keyword is none of ``fully_shard``.
        LeafNotFoundError: there are no leaves, or one is no part of the model.
        LeafShardError: a leaf is a container that is never called, or it, something in it or something around it is
            sharded already. Nothing is changed.
    """
    check_model(model)
    if leaves is None:
        units = outermost_leaves(model)
        if not units:
            raise LeafNotFoundError(
                f"leaves is None and {type(model).__name__} has no flagged modules: flag some by mark_leaves() first"
            )
        names = {id(module): name for name, module in model.named_modules()}
        chosen = {names[id(unit)]: unit for unit in units}
    else:
        chosen = _outermost(select_modules(model, modules=leaves).modules)
    _check(model, chosen)
    from torch.distributed.fsdp import fully_shard

    try:
        inspect.signature(fully_shard).bind(model, **fully_shard_kwargs)
    except TypeError as error:
        raise LeafTypeError(f"torch's fully_shard does not take these keywords: {error}") from None
    for unit in chosen.values():
        finish = reduce_unused(unit) if reduce_scatter_unused_params else None
        fully_shard(unit, **fully_shard_kwargs)
        if finish is not None:
            finish()
    return list(chosen.values())


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    below = {id(part) for module in modules.values() for part in module.modules() if part is not module}
    return {name: module for name, module in modules.items() if id(module) not in below}


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        where = f"leaf {name!r} ({type(module).__name__})"
        if never_called(module):
            raise LeafShardError(
                f"{where} is never called itself, so FSDP2 cannot gather it: take the module that holds it"
            )
        for part_name, part in module.named_modules(prefix=name):
            if _is_sharded(part):
                raise LeafShardError(
                    f"{where}: {part_name!r} is sharded already: call fully_shard_leaves() before any fully_shard(), "
                    "and shard nothing inside a leaf"
                )
    units = {id(unit): leaf for leaf, unit in chosen.items()}
    for name, module in model.named_modules():
        if not _is_sharded(module):
            continue
        held = next((units[id(part)] for part in module.modules() if id(part) in units), None)
        if held is not None:
            raise LeafShardError(
                f"{name!r} ({type(module).__name__}) is sharded already and holds the leaf {held!r}: call "
                "fully_shard_leaves() before fully_shard() on what is around the leaves"
            )


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)

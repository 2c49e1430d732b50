"""The same choice applied to FSDP2: every leaf is one ``fully_shard`` unit."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from ds_z3leaf._flags import never_called, outermost_leaves
from ds_z3leaf._layers import has_parameters_outside, repeated_blocks
from ds_z3leaf._preflight import PlannedUnit, check_units
from ds_z3leaf._select import select_modules
from ds_z3leaf._unused import reduce_unused
from ds_z3leaf._walk import check_model
from ds_z3leaf.errors import LeafNotFoundError, LeafShardError, LeafTypeError, LeafValueError

logger = logging.getLogger("ds.z3leaf")


def fully_shard_leaves(
    model: nn.Module,
    leaves: nn.Module | Iterable[nn.Module] | None = None,
    *,
    reduce_scatter_unused_params: bool = True,
    mixed_dtypes: Literal["raise", "separate"] = "raise",
    **fully_shard_kwargs: Any,
) -> list[nn.Module]:
    """Make each leaf one FSDP2 unit, and have it reduce the gradients of experts that this rank did not use.

    FSDP2 gathers and reduces unit by unit. With a unit for each expert, ranks that use different experts wait for each
    other for ever; with one unit for the block they do not, if every rank also sends zeros for what it did not use.
    Call it before ``fully_shard`` on the layers and the model around, which then leave the leaves alone;
    `LeafPlan.apply_fsdp2` does all of it.

    Args:
        model: the model.
        leaves: the modules to shard; those that are flagged when left out. Leaves inside other leaves go with them.
        reduce_scatter_unused_params: send zeros for parameters without a gradient. Only turn it off if every rank uses
            every parameter in every step.
        mixed_dtypes: what to do with a leaf whose trainable parameters have several dtypes, such as a float32 router
            beside bfloat16 experts. ``"raise"``; or ``"separate"``: the children that hold the smaller part become
            units of their own inside the leaf, if they are direct children that the leaf's forward always calls, and no
            experts.
        fully_shard_kwargs: given to `torch.distributed.fsdp.fully_shard` (``mesh``, ``mp_policy``, ...).

    Returns:
        The units of the leaves, in the order of ``model.modules()``. All ranks of the mesh must call it, with the same
        leaves.

    Raises:
        LeafTypeError: `model` or a leaf is no module, or a keyword is none of ``fully_shard``.
        LeafNotFoundError: `leaves` is None and no module is flagged, or a leaf is no part of the model.
        LeafValueError: `mixed_dtypes` is none of its values.
        LeafShardError: nothing is changed, and a leaf is a container that is never called; it, something in it or
            something around it is sharded already, by FSDP2, FSDP1, ZeRO-3 or a DTensor on another mesh; it holds
            dtypes that FSDP2 cannot take, or a parameter that FSDP2 cannot shard; or it shares a parameter with another
            leaf or with what is around.
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
        listed = [leaves] if isinstance(leaves, nn.Module) or not isinstance(leaves, Iterable) else list(leaves)
        chosen = _outermost(select_modules(model, modules=listed).modules) if listed else {}
    shard_units(model, chosen, None, False, mixed_dtypes, reduce_scatter_unused_params, fully_shard_kwargs)
    return list(chosen.values())


def shard_units(
    model: nn.Module,
    leaves: Mapping[str, nn.Module],
    layers: object,
    root: bool,
    mixed_dtypes: object,
    reduce_scatter_unused_params: bool,
    options: dict[str, Any],
) -> list[nn.Module]:
    """Check everything, then shard leaves, layers and root; `LeafPlan.apply_fsdp2` says what each argument means."""
    from torch.distributed.fsdp import fully_shard

    try:
        inspect.signature(fully_shard).bind(model, **options)
    except TypeError as error:
        raise LeafTypeError(f"torch's fully_shard does not take these keywords: {error}") from None
    inside = {id(part) for leaf in leaves.values() for part in leaf.modules()}
    around = {name: module for name, module in _layers(model, leaves, layers).items() if id(module) not in inside}
    planned = [PlannedUnit("leaf", name, module) for name, module in leaves.items()]
    # Inner layers first: fully_shard leaves alone what is sharded already.
    order = {name: at for at, name in enumerate(around)}
    inner_first = sorted(around.items(), key=lambda item: (-_depth(item[0]), order[item[0]]))
    planned += [PlannedUnit("layer", name, module) for name, module in inner_first]
    if root and id(model) not in {id(unit.module) for unit in planned}:
        planned.append(PlannedUnit("root", "", model))
    _check_state(model, planned)
    separate = check_units(model, planned, mixed_dtypes, options)
    for unit in planned:
        for part in [*separate[id(unit.module)], unit.module]:
            finish = reduce_unused(part) if reduce_scatter_unused_params and unit.kind == "leaf" else None
            fully_shard(part, **options)
            if finish is not None:
                finish()
    return [unit.module for unit in planned]


def _depth(name: str) -> int:
    return name.count(".") + bool(name)


def _layers(model: nn.Module, leaves: Mapping[str, nn.Module], layers: object) -> dict[str, nn.Module]:
    """The layers to shard, by name."""
    if layers is None:
        return {}
    if isinstance(layers, str):
        if layers != "auto":
            raise LeafValueError(f'layers is {layers!r}: pass "auto", modules of the model, or None')
        return _automatic(model, leaves)
    listed = [layers] if isinstance(layers, nn.Module) else layers
    if not isinstance(listed, Iterable):
        raise LeafTypeError(f'layers is a {type(layers).__name__}: pass "auto", modules of the model, or None')
    modules = list(listed)
    return dict(select_modules(model, modules=modules).modules) if modules else {}


def _automatic(model: nn.Module, leaves: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The repeated blocks, but never the experts of a mixture that nobody made a leaf."""
    from ds_z3leaf._candidates import find_leaf_candidates

    inside = {id(part) for leaf in leaves.values() for part in leaf.modules()}
    candidates = [found for found in find_leaf_candidates(model) if id(found.module) not in inside]
    blocks = repeated_blocks(model, [*leaves.values(), *(found.module for found in candidates)])
    for found in candidates:
        if has_parameters_outside(found.module, inside):
            logger.warning(
                "%s (%s) looks like a mixture of experts and is no leaf of the plan (%s): the unit around it takes it "
                "and does not send zeros for experts that a rank does not use; plan it as a leaf",
                found.name,
                type(found.module).__name__,
                found.reason,
            )
    return blocks


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    below = {id(part) for module in modules.values() for part in module.modules() if part is not module}
    return {name: module for name, module in modules.items() if id(module) not in below}


def _check_state(model: nn.Module, planned: list[PlannedUnit]) -> None:
    """Raise if a unit is a container, or something in it or around it is sharded already."""
    for unit in planned:
        if never_called(unit.module):
            raise LeafShardError(
                f"{unit} is never called itself, so FSDP2 cannot gather it: take the module that holds it"
            )
        for part_name, part in unit.module.named_modules(prefix=unit.name):
            if _is_sharded(part):
                raise LeafShardError(
                    f"{unit}: {part_name!r} is sharded already: call fully_shard_leaves() before any fully_shard(), "
                    "and shard nothing inside a leaf"
                )
    units = {id(unit.module): unit for unit in planned}
    for name, module in model.named_modules():
        if not _is_sharded(module):
            continue
        held = next((units[id(part)] for part in module.modules() if id(part) in units), None)
        if held is not None:
            raise LeafShardError(
                f"{name!r} ({type(module).__name__}) is sharded already and holds the {held.kind} {held.name!r}: call "
                "fully_shard_leaves() before fully_shard() on what is around the leaves"
            )


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)

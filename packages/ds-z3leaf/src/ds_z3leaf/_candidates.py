"""Find the mixture-of-experts blocks of a model, which are what leaf modules are for, and say why each is one.

A block is a module that routes: its ranks use different experts in different order, so it must be gathered whole.
Three signs count, each of which needs the router in the same module, so that a plain stack of layers is never one:

- the class, or one it derives from, is a known block;
- a list of at least two experts of one class (a ``ModuleList`` or ``ModuleDict``) beside a router;
- experts fused into 3-D parameters (expert, in, out) beside a router.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ds_z3leaf._matchers import class_names
from ds_z3leaf._plan import LeafCandidate
from ds_z3leaf._select import check_model
from ds_z3leaf._sizes import full_shape

# Sparse blocks of Hugging Face transformers, by class name.
KNOWN_BLOCKS = frozenset(
    {
        "ArcticMoE",
        "DbrxFFN",
        "DeepseekMoE",
        "DeepseekV2MoE",
        "DeepseekV2Moe",
        "DeepseekV3MoE",
        "Glm4MoeMoE",
        "GptOssMLP",
        "GraniteMoeMoE",
        "JambaSparseMoeBlock",
        "JetMoeMoE",
        "Llama4TextMoe",
        "MixtralSparseMoeBlock",
        "NllbMoeSparseMLP",
        "OlmoeSparseMoeBlock",
        "PhimoeSparseMoeBlock",
        "Qwen2MoeSparseMoeBlock",
        "Qwen3MoeSparseMoeBlock",
        "SwitchTransformersSparseMLP",
    }
)
# `gate_proj` and `gate_up_proj` are parts of a gated MLP, no routers.
_ROUTER = re.compile(r"(^|_)(router|gating|switch)(_|$)|(^|_)gate$|^gate_(network|linear|layer|weight)$|^wg$", re.I)
_EXPERTS = re.compile(r"expert|moe", re.I)


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
    >>> print(*find_leaf_candidates(nn.Sequential(nn.Linear(4, 4), Block())))
    1 (Block): 2 experts of class Linear in 'experts' beside the router 'router'
    """
    check_model(model)
    found: list[LeafCandidate] = []
    inside: set[int] = set()  # modules of a candidate
    for name, module in model.named_modules():
        reason = None if id(module) in inside else _reason(module)
        if reason:
            found.append(LeafCandidate.of(name, module, reason))
            inside.update(id(part) for part in module.modules())
    return found


def _reason(module: nn.Module) -> str | None:
    known = KNOWN_BLOCKS.intersection(class_names(module))
    if known:
        return f"{min(known)} is a known mixture-of-experts block"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None  # never called itself
    router = next(_routers(module), None)
    if router is None:
        return None
    for name, experts in _expert_lists(module):
        named = _EXPERTS.search(name) or _EXPERTS.search(type(module).__name__)
        if named or _outputs(module, router) == len(experts):
            return (
                f"{len(experts)} experts of class {type(experts[0]).__name__} in {name!r} beside the router {router!r}"
            )
    for name, count in _fused(module):
        return f"{count} experts fused into {name!r} beside the router {router!r}"
    return None


def _routers(module: nn.Module) -> Iterator[str]:
    """Names of the direct children and parameters that are called like a router and are none of the expert lists."""
    for name, child in module.named_children():
        if _ROUTER.search(name) and not _expert_list(child):
            yield name
    for name, _ in module.named_parameters(recurse=False):
        if _ROUTER.search(name):
            yield name


def _outputs(module: nn.Module, router: str) -> int | None:
    """How many experts a linear router chooses from."""
    return getattr(getattr(module, router), "out_features", None)


def _expert_lists(module: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of experts: children, or one level down in a child that is called experts."""
    for name, child in module.named_children():
        if members := _expert_list(child):
            yield name, members
        elif _EXPERTS.search(name):
            for inner, grandchild in child.named_children():
                if members := _expert_list(grandchild):
                    yield f"{name}.{inner}", members


def _expert_list(child: nn.Module) -> list[nn.Module]:
    """The members of a list of at least two modules of one class that have parameters."""
    if not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        return []
    members = list(child.children())
    alike = len(members) > 1 and len({type(member) for member in members}) == 1
    return members if alike and any(True for _ in members[0].parameters()) else []


def _fused(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of 3-D parameters, of the module or of a child called experts, and how many experts they hold."""
    for holder_name, holder in (("", module), *module.named_children()):
        if type(holder).__module__.startswith("torch.nn.modules."):
            continue  # a convolution's weights have three dimensions too
        named = _EXPERTS.search(holder_name) or _EXPERTS.search(type(holder).__name__)
        shapes = {name: full_shape(param) for name, param in holder.named_parameters(recurse=False)}
        for name, shape in shapes.items():
            if len(shape) == 3 and shape[0] > 1 and (named or _EXPERTS.search(name)):
                yield (f"{holder_name}.{name}" if holder_name else name), shape[0]

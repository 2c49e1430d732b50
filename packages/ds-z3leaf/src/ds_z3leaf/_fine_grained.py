"""Find subtrees of many small modules, which cost more in hooks and gathers than they save in memory.

[Note: granularity] A module's granularity is the number of elements of its parameters divided by the number of modules
in it (itself among them) that hold parameters, directly or below, torch's containers aside. It is what DeepSpeed calls
``stage3_module_granularity_threshold`` (deepspeed/runtime/zero/parameter_offload.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ds_z3leaf._flags import never_called
from ds_z3leaf._plan import LeafCandidate
from ds_z3leaf._sizes import full_shape
from ds_z3leaf._walk import check_model, walk
from ds_z3leaf.errors import LeafTypeError, LeafValueError

_CONTAINERS = frozenset(torch.nn.modules.container.__all__)


@dataclass(frozen=True)
class FineGrained:
    """What was found, and the smallest granularity of the model, for those who find nothing.

    Attributes:
        leaves: the outermost fine-grained modules.
        smallest: the smallest granularity of a module that may be a leaf; None if there is none.
        smallest_name: its name.
    """

    leaves: list[LeafCandidate]
    smallest: int | None
    smallest_name: str


def find_fine_grained(
    model: nn.Module, *, max_elements_per_module: int, max_elements: int = 1_000_000_000
) -> list[LeafCandidate]:
    """The outermost modules whose parameters are spread over many small modules. Changes nothing.

    Args:
        model: where to look.
        max_elements_per_module: the largest granularity, in elements; DeepSpeed's
            ``stage3_module_granularity_threshold``. A module without children is gathered at once anyway and is none.
        max_elements: the largest number of elements that may be gathered at once.

    Returns:
        The modules in the order of ``named_modules()``, none inside another, no containers that are never called.

    Raises:
        LeafTypeError: `model` is no module, or a number is none.
        LeafValueError: a number is not positive.

    >>> model = nn.Sequential(nn.Linear(100, 100), nn.TransformerEncoderLayer(4, 1, 8))
    >>> print(*find_fine_grained(model, max_elements_per_module=100))
    1 (TransformerEncoderLayer): 172 elements in 7 modules with parameters, 24 each (at most 100)
    """
    check_model(model)
    return search_fine_grained(model, max_elements_per_module, max_elements).leaves


def search_fine_grained(model: nn.Module, per_module: object, max_elements: object = 1_000_000_000) -> FineGrained:
    """`find_fine_grained`, and what comes nearest."""
    limit, most = _positive("max_elements_per_module", per_module), _positive("max_elements", max_elements)
    tree = walk(model)
    totals: dict[int, tuple[int, int]] = {}  # by id: modules with parameters, elements
    granularity: dict[int, int] = {}
    # Children come after their parents in a walk: backwards, they are done before.
    for module in reversed(tree.modules):
        if id(module) in totals:
            continue
        children = {id(child): child for child in module._modules.values() if child is not None}
        own = {id(param): param for param in module._parameters.values() if param is not None}
        elements = sum(math.prod(full_shape(param)) for param in own.values())
        below = [totals[key] for key in children]
        count = sum(found for found, _ in below)
        elements += sum(found for _, found in below)
        holds = elements > 0 or count > 0
        if not children:
            count = int(bool(own))
        elif type(module).__name__ not in _CONTAINERS and holds:
            count += 1
            if elements <= most and not never_called(module):
                granularity[id(module)] = elements // count
        totals[id(module)] = (count, elements)
    leaves: list[LeafCandidate] = []
    inside: set[int] = set()
    for name, module in tree:
        if id(module) in inside or granularity.get(id(module), limit + 1) > limit:
            continue
        count, elements = totals[id(module)]
        reason = f"{elements} elements in {count} modules with parameters, {elements // count} each (at most {limit})"
        leaves.append(LeafCandidate.of(name, module, reason))
        inside.update(id(part) for part in module.modules())
    smallest = min(granularity.values(), default=None)
    name = next((name for name, module in tree if granularity.get(id(module)) == smallest), "")
    return FineGrained(leaves, smallest, name)


def _positive(argument: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LeafTypeError(f"{argument} is a {type(value).__name__}: pass a number of elements")
    if not value >= 1:
        raise LeafValueError(f"{argument} is {value}: pass a positive number of elements")
    return int(value)

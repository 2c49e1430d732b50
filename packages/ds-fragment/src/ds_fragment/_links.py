"""What every rank knows of a parameter that lies in a flat partition, kept beside the parameter by identity.

`param._hp_mapping`, the attribute that engines read, is None on a rank that holds no part of the parameter. A
`FlatLink` is there on every rank, and knows the layout on all of them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_fragment._identity import IdentityMap
from ds_fragment._layout import Layout
from ds_fragment._place import Place


class FlatOwner(Protocol):
    """What keeps a flat partition and can say how far its gradients are."""

    def why_no_gradient(self, param: torch.Tensor) -> str | None:
        """Why there is no reduced gradient of the parameter now, or None if there is."""


@dataclass(slots=True, eq=False)
class FlatLink:
    """One parameter in a flat partition.

    Attributes:
        layout: over the flattened parameter, by group rank.
        group: the ranks that the partition is cut over; None for one rank without torch.distributed.
        flat: this rank's flat fp32 partition, weakly.
        dtype: of the partition.
        device: of the partition.
        owner: what made the link, weakly; None for `link_hp_params` called alone.
        places: by quantity, made on first use.
    """

    layout: Layout
    group: dist.ProcessGroup | None
    flat: weakref.ref[torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    owner: weakref.ref[Any] | None = None
    places: dict[str, Place] = field(default_factory=dict)


_links = IdentityMap[FlatLink]()


def link_of(param: torch.Tensor) -> FlatLink | None:
    """The parameter's link, or None."""
    return _links.get(param)


def set_link(param: torch.Tensor, link: FlatLink | None) -> None:
    """Link a parameter, or take its link away."""
    if link is None:
        _links.pop(param)
    else:
        _links[param] = link

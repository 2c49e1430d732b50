"""Compare the orders of the axes by the bytes that leave a node."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

from ds_groups._grid import View
from ds_groups._names import parse_axis
from ds_groups._presets import megatron
from ds_groups.errors import DivisibilityError, TopologyError, TopologyWarning

from .nodes import spread
from .traffic import LINKS, AxisTraffic, Load, Traffic, format_bytes, leaving, parse_traffic

if TYPE_CHECKING:
    from ds_groups._grid import AxisName
    from ds_groups._topology import ParallelTopology

_SHOWN_ORDERS = 3


@dataclass(frozen=True)
class OrderTraffic:
    """The bytes that leave a node with one order of the axes.

    Attributes:
        order: the axes from the fastest varying to the slowest.
        axes: what each axis adds.
        bytes_per_rank: bytes that leave a node for each of its ranks, on average over the world.
    """

    order: str
    axes: tuple[AxisTraffic, ...]
    bytes_per_rank: float


@dataclass(frozen=True)
class Advice:
    """What `ParallelTopology.advise` returns; ``print`` shows the arithmetic.

    Attributes:
        present: the order that the topology has.
        orders: every order that it could have, the best first. Among equals the present one comes first.
        ranks: of the topology.
        ranks_per_node: of one node.
        without_traffic: axes of more than one rank that no bytes were given for. They count as 0 in every order.
    """

    present: OrderTraffic
    orders: tuple[OrderTraffic, ...]
    ranks: int
    ranks_per_node: int
    without_traffic: tuple[str, ...]

    @property
    def best(self) -> tuple[OrderTraffic, ...]:
        """The orders that none beats."""
        least = self.orders[0].bytes_per_rank
        return tuple(one for one in self.orders if one.bytes_per_rank == least)

    def as_dict(self) -> dict[str, Any]:
        """The present order, the best ones and the number of orders, as JSON can hold them."""
        return {
            "present": _as_dict(self.present),
            "best": [_as_dict(one) for one in self.best[:_SHOWN_ORDERS]],
            "best_orders": len(self.best),
            "orders": len(self.orders),
            "without_traffic": list(self.without_traffic),
        }

    def __str__(self) -> str:
        present, best = self.present, self.best
        lines = [
            f"bytes that leave a node, for each of its ranks; {self.ranks_per_node} ranks a node",
            f"an axis adds: bytes on a link * links between nodes / {self.ranks} ranks",
            *_table(present, "present order"),
        ]
        if present in best:
            equal = f"; {len(best) - 1} are as good" if len(best) > 1 else ""
            lines.append(f"none of the {len(self.orders)} orders is better{equal}")
        else:
            saved = 1 - best[0].bytes_per_rank / present.bytes_per_rank
            lines += _table(best[0], f"best of {len(self.orders)} orders, {100 * saved:.3g} % less")
            if len(best) > 1:
                more = [one.order for one in best[1 : 1 + _SHOWN_ORDERS]]
                rest = len(best) - 1 - len(more)
                lines.append(f"as good: {', '.join(more)}{f' and {rest} more' if rest else ''}")
        worst = self.orders[-1]
        lines.append(f"worst: {worst.order}, {format_bytes(worst.bytes_per_rank)}")
        if self.without_traffic:
            lines.append(f"counted as 0, because no bytes were given: {', '.join(self.without_traffic)}")
        return "\n".join(lines)


def compare_orders(topology: ParallelTopology, traffic: Mapping[AxisName, Traffic]) -> Advice:
    """What `ParallelTopology.advise` returns."""
    nodes = topology.ranks_per_node
    if nodes is None:
        raise TopologyError("advise() has to know the nodes: give the topology ranks_per_node, such as 8")
    loads = parse_traffic(topology, traffic)
    if not loads:
        raise TopologyError("traffic={} names no axis: give bytes by axis, such as {'tp': 4e9, 'dp': 1e9}")
    present = _measure(topology, topology.order, loads, nodes)
    found = [present]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TopologyWarning)
        for order in _orders(topology):
            candidate = _reorder(topology, order)
            if candidate is not None:
                found.append(_measure(candidate, order, loads, nodes))
    found.sort(key=lambda one: one.bytes_per_rank)
    return Advice(present, tuple(found), len(topology.span), nodes, _without_traffic(topology, loads))


def _without_traffic(topology: ParallelTopology, loads: Sequence[Load]) -> tuple[str, ...]:
    data = ("dp_shard", "dp_replicate") if topology.dp_shard > 1 and topology.dp_replicate > 1 else ("dp",)
    names = ("tp", "cp", *data, "pp", *(("etp", "ep", "edp") if topology.ep > 1 else ()))
    given = {part for load in loads for part in _parts(topology, load.axis)}
    return tuple(name for name in names if topology.size(name) > 1 and not given & _parts(topology, name))


def _parts(topology: ParallelTopology, axis: AxisName) -> set[str]:
    found = parse_axis(axis, topology.names)
    return {*found, *(digit for name in found for digit in topology.aliases.get(name, ()))}


def _measure(topology: ParallelTopology, order: str, loads: Sequence[Load], nodes: int) -> OrderTraffic:
    found = tuple(leaving(load, spread(topology, load.axis, nodes), topology.axis(load.axis).name) for load in loads)
    return OrderTraffic(order, found, float(sum(one.leaving for one in found)))


def _orders(topology: ParallelTopology) -> Iterator[str]:
    """Every other order; axes of one rank stay where they are."""
    names: list[str] = []
    for name in topology.order.split("-"):
        halves = name == "dp" and topology.dp_shard > 1 and topology.dp_replicate > 1
        names += ["dp_shard", "dp_replicate"] if halves else [name]
    movable = [name for name in names if topology.size(name) > 1]
    for moved in permutations(movable):
        if list(moved) != movable:
            rest = iter(moved)
            yield "-".join(next(rest) if name in movable else name for name in names)


def _reorder(topology: ParallelTopology, order: str) -> ParallelTopology | None:
    """The topology in another order; None where Megatron would refuse it."""
    if _is_megatron(topology):
        sizes = {name: getattr(topology, name) for name in ("tp", "cp", "pp", "ep", "etp", "span")}
        try:
            megatron(topology.world_size, order=order, **sizes)
        except DivisibilityError:
            return None
    plain = topology.replace(order=order, ranks_per_node=None, views=())
    before, after = (tuple(digit.name for digit in one.digits) for one in (topology, plain))
    views = [View(view.digits, after if view.over == before else view.over) for view in topology.views]
    return plain.replace(views=tuple(views)) if views else plain


def _is_megatron(topology: ParallelTopology) -> bool:
    return "ep" in topology.order.split("-") and topology.extra_axes.get("mp") == ("tp", "pp")


def _table(one: OrderTraffic, title: str) -> list[str]:
    lines = [f"{title}: {one.order}, {format_bytes(one.bytes_per_rank)}"]
    rows = [("axis", "size", "pattern", "on a link", "between nodes", "adds")]
    for axis in one.axes:
        links = f"{axis.crossing} of {axis.links} {LINKS[axis.pattern]}"
        adds = format_bytes(axis.leaving)
        rows.append((axis.axis, str(axis.size), axis.pattern, format_bytes(axis.link_bytes), links, adds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return lines


def _as_dict(one: OrderTraffic) -> dict[str, Any]:
    axes = [
        axis._asdict() | {"link_bytes": float(axis.link_bytes), "leaving": float(axis.leaving)} for axis in one.axes
    ]
    return {"order": one.order, "bytes_per_rank": one.bytes_per_rank, "axes": axes}

"""`ParallelTopology`: a `RankGrid` by the names and sizes that training frameworks use."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from ._digits import make_digits
from ._grid import RankGrid, View, check_size
from ._launchers import LAUNCHERS
from .errors import DivisibilityError, TopologyError, TopologyWarning

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._grid import AxisName
    from ._rehearse.advise import Advice
    from ._rehearse.traffic import Traffic

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp")
DATA_AXES = ("dp_shard", "dp_replicate")
_SIZES = ("world_size", "tp", "pp", "cp", "dp", "dp_shard", "dp_replicate", "ep", "etp")
_INFERRED = ("dp", "dp_shard", "dp_replicate", "etp")


class _Computed(int):
    """A size that was left out. `dataclasses.replace` hands the same object back, so that it is computed again."""


@dataclass(frozen=True, repr=False, eq=False)
class ParallelTopology(RankGrid):
    """How the ranks of a world are cut into parallel groups.

    Args:
        world_size: how many ranks there are; None asks ``torch.distributed``, or else the launcher's variables.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        cp: context (or sequence) parallel size.
        dp: data parallel size; -1 takes what the others leave.
        dp_shard: how many data ranks share one sharded copy (hybrid sharding, hpZ); -1 takes what ``dp_replicate``
            leaves of ``dp``. The axes ``"dp_shard"`` and ``"dp_replicate"`` cut ``"dp"`` in two.
        dp_replicate: how many sharded copies there are; -1 takes what ``dp_shard`` leaves, or is 1.
        ep: expert parallel size. Experts need no ranks of their own: ``etp``, ``ep`` and ``edp`` (the ranks beside
            them, which hold the same experts) factor the ranks of ``ep_axes`` a second time.
        etp: tensor parallel size of the experts; -1 is 1 where ``ep_axes`` has ``tp``, and ``tp`` where it does not.
        order: the axes from the fastest varying (neighbouring ranks) to the slowest. ``"dp"`` may be written as its
            two halves. ``"ep"`` may stand in it, as in Megatron, and says where expert ranks vary among ``tp`` and
            ``dp``; left out, it stands before ``dp``.
        ep_axes: the axes whose ranks experts factor; the others stay as they are. ``"dp"`` keeps experts tensor
            parallel. None is ``"tp-cp-dp_shard"``: experts stay inside one replica, and the ranks that hold the same
            experts everywhere are the axis ``("edp", "dp_replicate")``. Experts that do not fit into one replica are
            spread over replicas, with a `TopologyWarning`.
        data_before_expert: whether ``edp`` varies faster than ``ep``. False keeps the ranks of an expert group
            next to each other.
        by_lane: experts count the ranks of one tensor rank after those of another, as DeepSpeed's ``mp_mode="tp"``
            does, instead of in ascending order.
        span: the ranks that the topology covers, in the order in which they are laid out; None is all of the world.
        ranks_per_node: ranks of one node, for the axes ``"local"`` and ``"node"``. A `TopologyWarning` says where
            tensor parallel groups leave a node.
        extra_axes: names for several axes: ``{"fsdp": ("dp_shard", "cp")}``.
        views: further factorisations; `view` makes them.

    Raises:
        DivisibilityError: the sizes do not fit the world, or the experts do not fit their ranks.
        TopologyError: a size is not a positive integer, or ``order`` or ``ep_axes`` is malformed.

    >>> topology = ParallelTopology(16, tp=2, ep=4, ep_axes="dp")
    >>> topology.dp
    8
    >>> topology.ranks("dp", 3)
    (1, 3, 5, 7, 9, 11, 13, 15)
    >>> topology.ranks("ep", 3), topology.ranks("edp", 3)
    ((1, 3, 5, 7), (3, 11))
    >>> dataclasses.replace(topology, tp=4).dp
    4
    """

    world_size: int = None  # type: ignore[assignment]
    _: KW_ONLY
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = -1
    dp_shard: int = -1
    dp_replicate: int = -1
    ep: int = 1
    etp: int = -1
    order: str = "tp-cp-dp-pp"
    ep_axes: str | None = None
    data_before_expert: bool = False
    by_lane: bool = False
    span: Sequence[int] = None  # type: ignore[assignment]
    ranks_per_node: int | None = None
    extra_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    views: tuple[View, ...] = ()
    _computed: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        for name in (*_INFERRED, "span"):
            if any(getattr(self, name) is value for value in self._computed):
                object.__setattr__(self, name, None if name == "span" else -1)
        if self.world_size is None:
            object.__setattr__(self, "world_size", launched_world_size())
        for name in _SIZES:
            if name not in _INFERRED or getattr(self, name) != -1:
                object.__setattr__(self, name, check_size(name, getattr(self, name)))
        left_out = [name for name in _INFERRED if getattr(self, name) == -1]
        order = _parse_order(self.order)
        if self.data_before_expert and "ep" in order:
            raise TopologyError(f"order={self.order!r} places ep already; leave data_before_expert out")
        span = range(self.world_size) if self.span is None else self.span
        sizes = self._fill_data_sizes(len(span))
        experts = self._expert_view(order, sizes)
        aliases = {"dp": DATA_AXES, **({} if "tp" in experts.over else {"etp": ("tp",)}), **self.extra_axes}
        digits = make_digits((name, sizes[name]) for name in _atoms(order))
        computed: list[object] = [span] if self.span is None else []
        for name in left_out:
            computed.append(_Computed(getattr(self, name)))
            object.__setattr__(self, name, computed[-1])
        more = self.views
        self._lay_out(digits, span, self.world_size, aliases, (experts, *more), self.ranks_per_node)
        object.__setattr__(self, "views", more)
        object.__setattr__(self, "_computed", tuple(computed))
        self._warn_of_nodes()

    def _fill_data_sizes(self, count: int) -> dict[str, int]:
        """Compute the data parallel sizes that were left out; return the size of every digit."""
        rest = {"tp": self.tp, "cp": self.cp, "pp": self.pp}
        ranks = "world size" if count == self.world_size else "span"
        dp, shard, replicate = self.dp, self.dp_shard, self.dp_replicate
        if dp == -1 and -1 not in (shard, replicate):
            dp = shard * replicate
        if dp == -1:
            if count % prod(rest.values()):
                raise DivisibilityError(f"{ranks} {count} must be a multiple of {_product(rest)}")
            dp = count // prod(rest.values())
        sizes = {"tp": self.tp, "cp": self.cp, "dp": dp, "pp": self.pp}
        if prod(sizes.values()) != count:
            raise DivisibilityError(f"{_product(sizes)} must equal {ranks} {count}; leave dp out to have it computed")
        if shard == -1 and replicate == -1:
            shard, replicate = dp, 1
        elif replicate == -1:
            if dp % shard:
                raise DivisibilityError(_must_divide("dp_shard size", {"dp_shard": shard}, {"dp": dp}))
            replicate = dp // shard
        elif shard == -1:
            if dp % replicate:
                raise DivisibilityError(_must_divide("dp_replicate size", {"dp_replicate": replicate}, {"dp": dp}))
            shard = dp // replicate
        if shard * replicate != dp:
            both = {"dp_shard": shard, "dp_replicate": replicate}
            raise DivisibilityError(f"{_product(both)} must equal dp = {dp}; leave one of them out to have it computed")
        for name, value in {"dp": dp, "dp_shard": shard, "dp_replicate": replicate}.items():
            object.__setattr__(self, name, value)
        return {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp_shard": shard, "dp_replicate": replicate, "dp": dp}

    def _expert_view(self, order: Sequence[str], sizes: Mapping[str, int]) -> View:
        """How experts factor the ranks of ``ep_axes``; sets ``etp`` where it was left out."""
        folded = self._expert_axes(order, sizes)
        if "tp" not in folded:
            if self.etp not in (-1, self.tp):
                raise TopologyError(f"etp={self.etp} must be tp={self.tp} where ep_axes={self.ep_axes!r} leaves tp out")
            object.__setattr__(self, "etp", self.tp)
            expert = {"ep": self.ep}
        else:
            object.__setattr__(self, "etp", max(self.etp, 1))
            expert = {"etp": self.etp, "ep": self.ep}
        whole = prod(sizes[axis] for axis in folded)
        if whole % prod(expert.values()):
            named = {name: size for name, size in expert.items() if name == "ep" or size > 1}
            raise DivisibilityError(_must_divide("expert size", named, _named(folded, sizes)))
        expert["edp"] = whole // prod(expert.values())
        names = _expert_order(order, data_first=self.data_before_expert)
        if self.by_lane:
            folded.sort(key=lambda atom: atom == "tp")
        return View(make_digits((name, expert[name]) for name in names if name in expert), tuple(folded))

    def _expert_axes(self, order: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
        """The digits that experts factor."""
        if self.ep_axes is not None:
            axes = self.ep_axes.split("-") if isinstance(self.ep_axes, str) else []
            known = (*DENSE_AXES, *DATA_AXES)
            atoms = [atom for axis in axes for atom in (DATA_AXES if axis == "dp" else (axis,))]
            if not atoms or not set(axes) <= set(known) or len(set(atoms)) != len(atoms):
                raise TopologyError(f"ep_axes={self.ep_axes!r} must join distinct axes of {', '.join(known)} with '-'")
            return [atom for atom in _atoms(order) if atom in atoms]
        inside = [atom for atom in _atoms(order) if atom in ("tp", "cp", "dp_shard")]
        wanted, region = self.ep * max(self.etp, 1), prod(sizes[atom] for atom in inside)
        if region % wanted == 0 or region * self.dp_replicate % wanted:
            return inside
        warnings.warn(
            f"etp * ep = {wanted} does not divide {_product(_named(inside, sizes))}: expert groups cross the "
            f"{self.dp_replicate} replicas of hybrid sharding; say ep_axes='tp-cp-dp' if that is meant",
            TopologyWarning,
            stacklevel=5,
        )
        return [atom for atom in _atoms(order) if atom != "pp"]

    def _warn_of_nodes(self) -> None:
        nodes = self.ranks_per_node
        if nodes is None:
            return
        for name in ("tp", "etp"):
            if self.size(name) == 1:
                continue
            crossing = next((group for group in self.groups(name) if len({rank // nodes for rank in group}) > 1), None)
            if crossing is not None:
                warnings.warn(
                    f"{name}={self.size(name)} leaves a node of {nodes} ranks: the group of ranks "
                    f"{', '.join(map(str, crossing[:8]))}{', ...' if len(crossing) > 8 else ''} is on more than one; "
                    f"put it first in order={self.order!r}, or choose a size that divides {nodes}",
                    TopologyWarning,
                    stacklevel=4,
                )
                return

    def replace(self, **changes: Any) -> Self:
        """The same topology with other sizes or options; sizes that were left out are computed again.

        >>> ParallelTopology(16, tp=2).replace(tp=4).dp
        4
        """
        return dataclasses.replace(self, **changes)

    def _with_view(self, view: View) -> Self:
        return self.replace(views=(*self.views, view))

    def axes_in_use(self) -> tuple[str, ...]:
        """The axes along which groups have more than one rank, each set of groups once; of experts if there are any."""
        names = [*DENSE_AXES, *DATA_AXES, *(EXPERT_AXES if self.ep > 1 else ())]
        names += [digit.name for view in self.views for digit in view.digits]
        found: dict[str, str] = {}
        for name in names:
            if self.size(name) > 1:
                found.setdefault(self.axis(name).key, name)
        return tuple(found.values())

    def advise(self, traffic: Mapping[AxisName, Traffic]) -> Advice:
        """Compare every order of the axes by the bytes that leave a node. A model; nothing is measured.

        Args:
            traffic: axis -> bytes that one rank sends along it in a step, or (bytes, pattern). See `Traffic`: the
                pattern is ``"ring"``, ``"all-to-all"`` or ``"pipeline"``, by default that of the axis' name.

        Returns:
            The orders, the best first, each with its bytes a rank; ``print`` shows the arithmetic.

        Raises:
            TopologyError: ``ranks_per_node`` is not known, or the traffic is malformed.
        """
        from ._rehearse.advise import compare_orders

        return compare_orders(self, traffic)

    def as_dict(self) -> dict[str, Any]:
        """The topology as JSON can hold it, sizes and options by name; equal for equal topologies."""
        found = super().as_dict()
        experts = found["views"].pop(0)
        sizes = {name: getattr(self, name) for name in _SIZES}
        experts = {"ep_axes": "-".join(experts["over"]), "ep_order": "-".join(experts["digits"])}
        return {**found, **sizes, "order": self.order, **experts}

    def __repr__(self) -> str:
        shown = [str(self.world_size)]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            computed = any(value is other for other in self._computed)
            if item.name[0] != "_" and item.name != "world_size" and value != _DEFAULTS[item.name] and not computed:
                shown.append(f"{item.name}={value!r}")
        return f"ParallelTopology({', '.join(shown)})"


_DEFAULTS = {item.name: item.default for item in dataclasses.fields(ParallelTopology)} | {"extra_axes": {}}


def launched_world_size(environ: Mapping[str, str] | None = None) -> int:
    """Ranks of the default process group, or those that the launcher started.

    Raises:
        TopologyError: there is neither.
    """
    dist = sys.modules.get("torch.distributed")
    if environ is None and dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size())
    found = os.environ if environ is None else environ
    for launcher in LAUNCHERS:
        if found.get(launcher.rank, "") != "" and launcher.size is not None and found.get(launcher.size, "").isdigit():
            return int(found[launcher.size])
    raise TopologyError(
        "world_size was left out, and there is no process group and no launcher that says how many ranks there are: "
        "give it, or call torch.distributed.init_process_group() first"
    )


def _parse_order(order: object) -> tuple[str, ...]:
    names = tuple(order.split("-")) if isinstance(order, str) else ()
    known = (*DENSE_AXES, *DATA_AXES, "ep")
    atoms = [atom for name in names for atom in (DATA_AXES if name == "dp" else (name,))]
    if not set(names) <= set(known) or len(set(atoms)) != len(atoms) or not names:
        raise TopologyError(f"order={order!r} must join distinct axes of {', '.join(DENSE_AXES)} with '-'")
    absent = [atom for atom in ("tp", "cp", *DATA_AXES, "pp") if atom not in atoms]
    if absent:
        spelled = ", ".join("dp" if absent[-2:] == list(DATA_AXES) and atom in DATA_AXES else atom for atom in absent)
        raise TopologyError(f"order={order!r} leaves out {spelled}; say where every axis goes, the fastest first")
    return names


def _atoms(order: Sequence[str]) -> list[str]:
    """The digits of an order, the fastest first."""
    return [atom for name in order if name != "ep" for atom in (DATA_AXES if name == "dp" else (name,))]


def _expert_order(order: Sequence[str], *, data_first: bool) -> list[str]:
    """The expert digits in the order of ``tp``, ``ep`` and ``dp``, the fastest first."""
    as_expert = {"tp": "etp", "ep": "ep", "dp": "edp", "dp_shard": "edp"}
    names = [as_expert[name] for name in order if name in as_expert]
    if "ep" not in names:
        names.insert(names.index("edp") + data_first, "ep")
    return names


def _named(atoms: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by name for a message, with ``dp`` where that is what the digits are."""
    found = {atom: sizes[atom] for atom in atoms if atom != "dp_replicate"}
    if "dp_replicate" in atoms or sizes["dp_replicate"] == 1:
        found = {("dp" if atom == "dp_shard" else atom): size for atom, size in found.items()}
        if "dp" in found:
            found["dp"] = sizes["dp"]
    return found


def _product(sizes: Mapping[str, int]) -> str:
    """Spell a product for an error message.

    >>> _product({"tp": 1, "dp": 8}), _product({"dp": 8})
    ('tp * dp = 1 * 8 = 8', 'dp = 8')
    """
    if len(sizes) == 1:
        return " = ".join(str(part) for item in sizes.items() for part in item)
    return f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} = {prod(sizes.values())}"


def _must_divide(what: str, divisor: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    whole, fixed = prod(sizes.values()), divisor.get("etp", 1)
    shown = next(iter(divisor.values())) if len(divisor) == 1 else _product(divisor)
    fitting = [str(value) for value in range(1, whole + 1) if whole % (value * fixed) == 0]
    return f"{what} {shown} must divide {_product(sizes)}; sizes that do: {', '.join(fitting) or 'none'}"

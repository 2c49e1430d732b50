"""`ParallelTopology`: which ranks work together along which axis. Pure arithmetic; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from ._axes import DENSE_AXES, EXPERT_ATOMS, Digit, atoms_of, make_digits, parse_order, product, turn
from ._describe import describe
from .errors import DivisibilityError, RankRangeError, TopologyError

if TYPE_CHECKING:
    from datetime import timedelta

    from ._bound import BoundTopology
    from ._options import GroupOptions

_SIZES = ("world_size", "tp", "pp", "cp", "dp", "dp_shard", "ep")


@dataclass(frozen=True)
class ParallelTopology:
    """How ``world_size`` ranks are cut into parallel groups.

    Args:
        world_size: how many ranks there are.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        cp: context (or sequence) parallel size.
        dp: data parallel size; -1 takes what the others leave.
        dp_shard: how many data ranks share one sharded copy (hybrid sharding, hpZ); -1 is all of ``dp``. The axes
            ``"dp_shard"`` and ``"dp_replicate"`` cut ``"dp"`` in two, the sharding ranks next to each other.
        ep: expert parallel size. Experts need no ranks of their own: ``ep`` and ``edp`` (the ranks that hold the
            same experts) cut the ranks of ``ep_axes`` a second time.
        order: the axes from the fastest varying (neighbouring ranks) to the slowest.
        ep_axes: the axes whose ranks expert parallelism cuts; the others stay as they are. ``"dp"`` keeps experts
            tensor parallel; the default spreads whole experts over the tensor and context ranks as well.
        data_before_expert: whether ``edp`` varies faster than ``ep``. False keeps the ranks of an expert group
            next to each other.

    Raises:
        DivisibilityError: the sizes do not fit the world, or ``ep`` or ``dp_shard`` does not divide its ranks.
        TopologyError: a size is not a positive integer, or ``order`` or ``ep_axes`` is malformed.

    >>> topology = ParallelTopology(16, tp=2, ep=4, ep_axes="dp")
    >>> topology.dp
    8
    >>> topology.ranks("dp", 3)
    (1, 3, 5, 7, 9, 11, 13, 15)
    >>> topology.ranks("ep", 3), topology.ranks("edp", 3)
    ((1, 3, 5, 7), (3, 11))
    >>> topology.coordinates(11)
    {'tp': 1, 'cp': 0, 'dp': 5, 'pp': 0, 'ep': 1, 'edp': 1}
    """

    world_size: int
    _: KW_ONLY
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = -1
    dp_shard: int = -1
    ep: int = 1
    order: str = "tp-cp-dp-pp"
    ep_axes: str = "tp-cp-dp"
    data_before_expert: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        order = parse_order("order", self.order, complete=True)
        ep_axes = parse_order("ep_axes", self.ep_axes, complete=False)
        rest = {"tp": self.tp, "cp": self.cp, "pp": self.pp}
        if self.dp == -1:
            if self.world_size % prod(rest.values()):
                raise DivisibilityError(
                    f"world size {self.world_size} must be a multiple of {product(list(rest), list(rest.values()))}"
                )
            object.__setattr__(self, "dp", self.world_size // prod(rest.values()))
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        if prod(sizes.values()) != self.world_size:
            raise DivisibilityError(
                f"{product(list(sizes), list(sizes.values()))} must equal world size {self.world_size}; "
                "leave dp out to have it computed"
            )
        if self.dp_shard == -1:
            object.__setattr__(self, "dp_shard", self.dp)
        if self.dp % self.dp_shard:
            raise DivisibilityError(_must_divide("dp_shard size", self.dp_shard, ["dp"], [self.dp]))
        folded = [axis for axis in DENSE_AXES if axis in ep_axes]
        if prod(sizes[axis] for axis in folded) % self.ep:
            raise DivisibilityError(_must_divide("expert size", self.ep, folded, [sizes[axis] for axis in folded]))
        object.__setattr__(self, "order", "-".join(order))
        object.__setattr__(self, "ep_axes", "-".join(axis for axis in order if axis in ep_axes))

    def size(self, axis: str) -> int:
        """How many ranks a group along ``axis`` has.

        >>> ParallelTopology(16, tp=2, pp=2, ep=2).size("tp_pp")
        4
        """
        sizes = {digit.name: digit.size for digit in (*self._digits, *self._expert_digits)}
        return prod(sizes[atom] for atom in self._atoms(axis))

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of ``rank`` along ``axis``, ascending, in time proportional to its size.

        Args:
            axis: ``tp``, ``cp``, ``dp``, ``dp_shard``, ``dp_replicate``, ``pp``, ``ep``, ``edp``, or several of
                them joined with underscores: ``"dp_cp"``. ``ep`` and ``edp`` mix only with axes outside ``ep_axes``.
            rank: a rank of the world.

        Returns:
            The ranks that differ from ``rank`` in these coordinates only. The position in it is the rank inside
            a process group of these ranks.

        Raises:
            RankRangeError: ``rank`` is outside the world.
            TopologyError: the axis is not known, or mixes what cannot be mixed.
        """
        self._check_rank(rank)
        atoms = self._atoms(axis)
        dense = [digit for digit in self._digits if digit.name in atoms]
        if not set(atoms) & set(EXPERT_ATOMS):
            return tuple(turn(rank, dense))
        folded, position = self._fold(rank)
        outside = rank - sum(digit.of(rank) * digit.stride for digit, _ in folded)
        expert = [digit for digit in self._expert_digits if digit.name in atoms]
        members = [
            outside + sum(where.of(place) * digit.stride for digit, where in folded) for place in turn(position, expert)
        ]
        return tuple(sorted(member for start in members for member in turn(start, dense)))

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """Every group along ``axis``, lazily, ordered by its smallest rank.

        >>> list(ParallelTopology(8, tp=2, pp=2).groups("dp"))
        [(0, 2), (1, 3), (4, 6), (5, 7)]
        """
        self._atoms(axis)
        return self._walk(axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on every axis: its position in the group along it.

        Raises:
            RankRangeError: ``rank`` is outside the world.
        """
        self._check_rank(rank)
        digit = {digit.name: digit.of(rank) for digit in self._digits}
        position = self._fold(rank)[1]
        found = {axis: digit[axis] for axis in ("tp", "cp")}
        found["dp"] = digit["dp_replicate"] * self.dp_shard + digit["dp_shard"]
        found["pp"] = digit["pp"]
        expert = {digit.name: digit.of(position) for digit in self._expert_digits}
        return {**found, "ep": expert["ep"], "edp": expert["edp"]}

    def rank_at(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates.

        Raises:
            RankRangeError: a coordinate is outside its axis.

        >>> ParallelTopology(16, tp=2, pp=2).rank_at(tp=1, pp=1)
        9
        """
        wanted = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
        sizes = {axis: self.size(axis) for axis in wanted}
        for axis, coordinate in wanted.items():
            if not 0 <= coordinate < sizes[axis]:
                raise RankRangeError(f"{axis} coordinate {coordinate} is outside 0..{sizes[axis] - 1}")
        wanted["dp_replicate"], wanted["dp_shard"] = divmod(wanted.pop("dp"), self.dp_shard)
        return sum(wanted[digit.name] * digit.stride for digit in self._digits)

    def describe(self, *axes: str, max_groups: int = 4) -> str:
        """A table of the groups along ``axes`` (all that have more than one rank), for people to read.

        >>> print(ParallelTopology(8, tp=2, ep=4).describe("tp", "dp", "ep"))
        world size 8, order tp-cp-dp-pp
        axis  size  groups  ranks
        tp       2       4  0 1 | 2 3 | 4 5 | 6 7
        dp       4       2  0 2 4 6 | 1 3 5 7
        ep       4       2  0 1 2 3 | 4 5 6 7
        """
        return describe(self, axes, max_groups)

    def bind(
        self,
        *,
        backend: str | None = None,
        timeout: timedelta | float | None = None,
        pg_options: Any = None,
        warm_up: bool = False,
        axes: Mapping[str, GroupOptions] | None = None,
    ) -> BoundTopology:
        """Process groups of this topology, made on first use. Makes nothing yet; no rank waits for another.

        Args:
            backend: of the groups; None is the default group's.
            timeout: of the groups' collectives, in seconds or as a timedelta; None is PyTorch's default.

        Raises:
            NotInitializedError: there is no default process group.
            TopologyError: ``world_size`` is not that of the default process group.
        """
        from ._bound import BoundTopology

        return BoundTopology(self, backend=backend, timeout=timeout, pg_options=pg_options, warm_up=warm_up, axes=axes)

    @cached_property
    def _digits(self) -> tuple[Digit, ...]:
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp_shard": self.dp_shard}
        sizes["dp_replicate"] = self.dp // self.dp_shard
        return make_digits((atom, sizes[atom]) for axis in self.order.split("-") for atom in atoms_of(axis))

    @cached_property
    def _expert_digits(self) -> tuple[Digit, ...]:
        """Digits of a rank's place among the folded ranks."""
        folded = prod(digit.size for digit in self._digits if digit.name in self._folded_atoms)
        ep, edp = ("ep", self.ep), ("edp", folded // self.ep)
        return make_digits([edp, ep] if self.data_before_expert else [ep, edp])

    @cached_property
    def _folded_atoms(self) -> frozenset[str]:
        return frozenset(atom for axis in self.ep_axes.split("-") for atom in atoms_of(axis))

    @cached_property
    def _folded(self) -> list[tuple[Digit, Digit]]:
        """For each folded atom, its digit in a rank and its digit in the place among the folded ranks."""
        inside = [digit for digit in self._digits if digit.name in self._folded_atoms]
        return list(zip(inside, make_digits((digit.name, digit.size) for digit in inside), strict=True))

    def _fold(self, rank: int) -> tuple[list[tuple[Digit, Digit]], int]:
        return self._folded, sum(digit.of(rank) * where.stride for digit, where in self._folded)

    def _walk(self, axis: str) -> Iterator[tuple[int, ...]]:
        seen = bytearray(self.world_size)
        for rank in range(self.world_size):
            if not seen[rank]:
                group = self.ranks(axis, rank)
                for member in group:
                    seen[member] = 1
                yield group

    def _atoms(self, axis: str) -> tuple[str, ...]:
        atoms = atoms_of(axis)
        clash = [atom for atom in atoms if atom in self._folded_atoms]
        if clash and set(atoms) & set(EXPERT_ATOMS):
            raise TopologyError(
                f"axis {axis!r} mixes expert axes with {clash[0]}, which ep_axes={self.ep_axes!r} cuts into them; "
                "take it out of the axis or out of ep_axes"
            )
        return atoms

    def _check_rank(self, rank: int) -> None:
        if not isinstance(rank, int) or not 0 <= rank < self.world_size:
            raise RankRangeError(f"rank {rank!r} is outside the world: 0..{self.world_size - 1}")


def _check_types(topology: ParallelTopology) -> None:
    for name in _SIZES:
        size = getattr(topology, name)
        allowed = name in ("dp", "dp_shard") and size == -1
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and not allowed):
            raise TopologyError(f"{name} must be a positive integer, got {size!r}")


def _must_divide(what: str, size: int, names: list[str], sizes: list[int]) -> str:
    whole = prod(sizes)
    fitting = ", ".join(str(value) for value in range(1, whole + 1) if whole % value == 0)
    return f"{what} {size} must divide {product(names, sizes)}; sizes that do: {fitting}"

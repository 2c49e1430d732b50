"""`RankGrid`: named digits over a span of ranks, and other factorisations of them. Pure arithmetic without torch.

[Note: grid] A grid lays its ranks out along *digits*, the fastest varying first: ``tp=2, dp=4`` puts tensor parallel
ranks next to each other. A *view* factors the ranks of some digits a second time, as experts do: ``etp, ep, edp``
over the ranks of ``tp, cp, dp``. An *axis* is one digit or several, and cuts the grid into groups: the ranks that
differ in these digits only. An axis holds digits of one view at most, and digits that this view leaves alone.

[Note: span] The place of a rank in the grid is its *position*, 0 to n - 1; ``span[position]`` is the rank. The span is
``range(n)``, another range (an offset), or any order of any ranks.

This file is one class, longer than most: what users call on a layout, half of it docstrings.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TextIO

from ._axis import Axis
from ._describe import describe
from ._digits import Digit, make_digits
from ._names import parse_axis
from .errors import DivisibilityError, RankRangeError, TopologyError

if TYPE_CHECKING:
    import os
    from datetime import timedelta

    from matplotlib.figure import Figure
    from typing_extensions import Self

    from ._bound import BoundTopology
    from ._options import GroupOptions
    from ._rehearse.rehearsal import Rehearsal
    from ._rehearse.traffic import Traffic

AxisName = str | Sequence[str]
NODE_AXES = ("local", "node")


class View(NamedTuple):
    """A second factorisation of the ranks of some digits.

    Attributes:
        digits: the new digits, the fastest first.
        over: names of the grid's digits that are factored, the fastest first: the order in which their ranks count.
    """

    digits: tuple[Digit, ...]
    over: tuple[str, ...]


class RankGrid:
    """Ranks laid out along named digits.

    Args:
        sizes: name -> size of every digit, the fastest varying (neighbouring ranks) first.
        span: the ranks, by position; None is ``range(product of the sizes)``. ``range(8, 16)`` leaves the first eight
            ranks of the world out, a sequence puts ranks in an order of its own.
        world_size: ranks of the world that the span is part of; None is the largest rank of the span plus one.
        aliases: name -> names of digits that it stands for: ``{"dp": ("dp_shard", "dp_replicate")}``.
        views: other factorisations; `view` makes them.
        ranks_per_node: adds the axes ``"local"`` (the ranks of one node) and ``"node"`` (those at the same place of
            every node), if the span is a range that begins at a node.

    Raises:
        TopologyError: names, sizes, the span or the nodes do not fit together.

    >>> grid = RankGrid({"tp": 2, "dp": 2}, span=range(4, 8)).view(ep=4)
    >>> grid.table("dp"), grid.table("ep")
    (((4, 6), (5, 7)), ((4, 5, 6, 7),))
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        span: Sequence[int] | None = None,
        world_size: int | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
        views: Sequence[View] = (),
        ranks_per_node: int | None = None,
    ) -> None:
        digits = make_digits((name, check_size(name, size)) for name, size in sizes.items())
        self._lay_out(digits, span, world_size, aliases or {}, views, ranks_per_node)

    def _lay_out(
        self,
        digits: tuple[Digit, ...],
        span: Sequence[int] | None,
        world_size: int | None,
        aliases: Mapping[str, Sequence[str]],
        views: Sequence[View],
        ranks_per_node: int | None,
    ) -> None:
        """Set the attributes, on a frozen dataclass too."""
        count = prod(digit.size for digit in digits)
        ranks = range(count) if span is None else span if isinstance(span, range) else tuple(map(operator.index, span))
        if len(ranks) != count:
            sizes = " * ".join(f"{digit.name}={digit.size}" for digit in digits)
            raise DivisibilityError(f"{sizes} = {count} must equal the {len(ranks)} ranks of the span")
        ends = (ranks[0], ranks[-1]) if isinstance(ranks, range) else ranks
        world = max(ends) + 1 if world_size is None else world_size
        if min(ends) < 0 or max(ends) >= world:
            raise RankRangeError(f"span {_short(ranks)} is outside the world: 0..{world - 1}")
        if not isinstance(ranks, range) and len(set(ranks)) != count:
            raise RankRangeError(f"span {_short(ranks)} holds a rank twice")
        nodes = _node_view(ranks, count, digits, ranks_per_node)
        for name, value in {
            "digits": digits,
            "span": ranks,
            "world_size": world,
            "aliases": {name: tuple(digit_names) for name, digit_names in aliases.items()},
            "views": tuple(views),
            "ranks_per_node": ranks_per_node,
            "_every_view": (*views, *nodes),
        }.items():
            object.__setattr__(self, name, value)
        self._check_names()

    digits: tuple[Digit, ...]
    """The digits, the fastest varying first."""
    span: Sequence[int]
    """The rank at every position."""
    world_size: int
    """Ranks of the world; the span may leave some out."""
    aliases: Mapping[str, tuple[str, ...]]
    """Names for several digits."""
    views: tuple[View, ...]
    """The other factorisations."""
    ranks_per_node: int | None
    """Ranks of one node, where known."""
    _every_view: tuple[View, ...]

    # Axes

    def axis(self, name: AxisName) -> Axis:
        """The groups along an axis.

        Args:
            name: a digit, an alias, several of them as a tuple, or joined with underscores: ``"dp_cp"``.

        Raises:
            TopologyError: the name is not known, repeats a digit, or mixes a view's digits with those it factors.
        """
        key = name if isinstance(name, str) else tuple(name)
        found = self._axes.get(key)
        if found is None:
            found = self._axes[key] = self._make_axis(key)
        return found

    def size(self, axis: AxisName) -> int:
        """How many ranks a group along ``axis`` has."""
        return self.axis(axis).size

    def ranks(self, axis: AxisName, rank: SupportsIndex) -> tuple[int, ...]:
        """The group of ``rank`` along ``axis``, in time proportional to its size.

        Args:
            axis: as for `axis`.
            rank: a rank of the grid.

        Returns:
            The ranks that differ from ``rank`` in these digits only. The place in it is the rank inside a process
            group of these ranks. Ascending, unless the span or the view has an order of its own.

        Raises:
            RankRangeError: ``rank`` is not in the grid.
            TopologyError: the axis is not known.
        """
        return self.axis(axis).ranks(rank)

    def table(self, axis: AxisName) -> tuple[tuple[int, ...], ...]:
        """Every group along ``axis``, ordered by its first position."""
        return self.axis(axis).table()

    def groups(self, axis: AxisName) -> Iterator[tuple[int, ...]]:
        """Every group along ``axis``, lazily, in the order of `table`."""
        return self.axis(axis).groups()

    def group_of(self, axis: AxisName, rank: SupportsIndex) -> int:
        """Which group of `table` holds ``rank``.

        >>> RankGrid({"tp": 2, "dp": 4}).group_of("tp", 5)
        2
        """
        return self.axis(axis).group_of(rank)

    def neighbours(self, axis: AxisName, rank: SupportsIndex, *, wrap: bool = True) -> tuple[int | None, int | None]:
        """The ranks before and after ``rank`` along ``axis``, as pipeline stages send to each other.

        Args:
            axis: as for `axis`.
            rank: a rank of the grid.
            wrap: the last is followed by the first; otherwise None stands at the ends.

        >>> grid = RankGrid({"tp": 2, "pp": 3})
        >>> grid.neighbours("pp", 0), grid.neighbours("pp", 0, wrap=False)
        ((4, 2), (None, 2))
        """
        group = self.ranks(axis, rank)
        place = group.index(operator.index(rank))
        before = group[place - 1] if place or wrap else None
        after = group[(place + 1) % len(group)] if place + 1 < len(group) or wrap else None
        return before, after

    # Coordinates

    def coordinates(self, rank: SupportsIndex) -> dict[str, int]:
        """Where ``rank`` stands on every digit, every alias and every view: its place in the group along it.

        Raises:
            RankRangeError: ``rank`` is not in the grid.
        """
        position = self.position(rank)
        found = {digit.name: digit.of(position) for digit in self.digits}
        for view in self._every_view:
            number = self._count(view, position)
            found.update({digit.name: digit.of(number) for digit in view.digits if digit.name not in found})
        for alias in self.aliases:
            found[alias] = sum(found[place.name] * place.stride for place in self._alias_digits(alias))
        return {name: found[name] for name in self.names}

    def rank_at(self, **coordinates: SupportsIndex) -> int:
        """The rank at these coordinates; what is left out is 0. The inverse of `coordinates`.

        Args:
            coordinates: of digits of the grid, or of one view and what it leaves alone; more are checked.

        Raises:
            RankRangeError: a coordinate is outside its axis.
            TopologyError: a name is not known, or the coordinates are not those of one rank.

        >>> grid = RankGrid({"tp": 2, "dp": 4}).view(ep=4, edp=2)
        >>> grid.rank_at(tp=1, dp=2), grid.rank_at(ep=1, edp=1), grid.rank_at(**grid.coordinates(5))
        (5, 5, 5)
        """
        wanted = {name: operator.index(value) for name, value in coordinates.items()}
        for name, value in wanted.items():
            if name not in self.names:
                raise TopologyError(f"{name!r} is no axis of this grid: {', '.join(self.names)}")
            if not 0 <= value < self.size(name):
                raise RankRangeError(f"{name} coordinate {value} is outside 0..{self.size(name) - 1}")
        for view in (None, *self._every_view):
            rank = self.span[self._position_at(wanted, view)]
            found = self.coordinates(rank)
            if all(found[name] == value for name, value in wanted.items()):
                return rank
        spelled = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise TopologyError(f"no rank is at {spelled}: give the coordinates of one factorisation, or of one rank")

    def position(self, rank: SupportsIndex) -> int:
        """The place of ``rank`` in the span.

        Raises:
            RankRangeError: it is not there.
        """
        number = -1 if isinstance(rank, bool) or not hasattr(rank, "__index__") else operator.index(rank)
        if not self.holds(number):
            whole = len(self.span) == self.world_size
            where = f"outside the world: 0..{self.world_size - 1}" if whole else f"not in {_short(self.span)}"
            raise RankRangeError(f"rank {rank!r} is {where}")
        return self.span.index(number) if isinstance(self.span, range) else self._positions[number]

    def holds(self, rank: int) -> bool:
        """Whether ``rank`` is one of the span."""
        return rank in (self.span if isinstance(self.span, range) else self._positions)

    # Other grids

    def view(self, *, over: Sequence[str] | None = None, **sizes: int) -> Self:
        """The same grid with one more factorisation of its ranks.

        Args:
            over: digits whose ranks are factored, the fastest first; None is all, in the order of the grid. The order
                says how ranks count: ``("dp", "tp")`` counts all data ranks of the first tensor rank first.
            sizes: name -> size of the new digits, the fastest first; one of them may be -1. A name that the grid has
                already must mean the same groups.

        Raises:
            DivisibilityError: the sizes do not multiply to the ranks that are factored.
            TopologyError: a name means something else already, or ``over`` names no digit.

        >>> RankGrid({"tp": 2, "cp": 2, "dp": 2}).view(etp=1, ep=4, edp=-1).ranks("edp", 1)
        (1, 5)
        """
        digits = {digit.name: digit.size for digit in self.digits}
        names = tuple(digits) if over is None else tuple(n for name in over for n in self.aliases.get(name, (name,)))
        if not set(names) <= set(digits) or len(set(names)) != len(names):
            raise TopologyError(f"over={over!r} must name distinct digits of the grid: {', '.join(digits)}")
        count = prod(digits[name] for name in names)
        known = {name: check_size(name, size) for name, size in sizes.items() if size != -1}
        whole = " * ".join(names) + " = " + " * ".join(str(digits[name]) for name in names)
        if len(known) < len(sizes) - 1:
            raise TopologyError(f"one size may be -1, got {sizes}")
        if count % prod(known.values()) or (len(known) == len(sizes) and prod(known.values()) != count):
            asked = " * ".join(f"{name}={size}" for name, size in known.items())
            verb = "equal" if len(known) == len(sizes) else "divide"
            raise DivisibilityError(f"{asked} = {prod(known.values())} must {verb} {whole} = {count}")
        filled = {name: known.get(name, count // prod(known.values())) for name in sizes}
        return self._with_view(View(make_digits(filled.items()), names))

    def _with_view(self, view: View) -> Self:
        sizes = {digit.name: digit.size for digit in self.digits}
        return type(self)(
            sizes,
            span=self.span,
            world_size=self.world_size,
            aliases=self.aliases,
            views=(*self.views, view),
            ranks_per_node=self.ranks_per_node,
        )

    # Reading

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every name that an axis can be made of."""
        found = [digit.name for digit in self.digits] + list(self.aliases)
        found += [digit.name for view in self._every_view for digit in view.digits]
        return tuple(dict.fromkeys(found))

    def axes_in_use(self) -> tuple[str, ...]:
        """The axes along which groups have more than one rank, each set of groups once."""
        found: dict[str, str] = {}
        for name in self.names:
            if name not in NODE_AXES and self.size(name) > 1:
                found.setdefault(self.axis(name).key, name)
        return tuple(found.values())

    def describe(self, *axes: AxisName, max_groups: int = 4) -> str:
        """A table of the groups along ``axes`` (all that are in use), for people to read.

        >>> print(RankGrid({"tp": 2, "dp": 4}).view(ep=4, edp=2).describe("tp", "dp", "ep"))
        world size 8, order tp-dp
        axis  size  groups  ranks
        tp       2       4  0 1 | 2 3 | 4 5 | 6 7
        dp       4       2  0 2 4 6 | 1 3 5 7
        ep       4       2  0 1 2 3 | 4 5 6 7
        """
        order = getattr(self, "order", "-".join(digit.name for digit in self.digits))
        return describe(self, axes, order, max_groups)

    def as_dict(self) -> dict[str, Any]:
        """The grid as JSON can hold it; equal for equal grids."""
        span = self.span
        return {
            "world_size": self.world_size,
            "span": [span.start, span.stop, span.step] if isinstance(span, range) else list(span),
            "digits": {digit.name: digit.size for digit in self.digits},
            "aliases": {name: list(names) for name, names in self.aliases.items()},
            "views": [
                {"over": list(view.over), "digits": {digit.name: digit.size for digit in view.digits}}
                for view in self._every_view
            ],
            "ranks_per_node": self.ranks_per_node,
        }

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, RankGrid) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{digit.name}={digit.size}" for digit in self.digits)
        views = "".join(
            f".view({', '.join(f'{digit.name}={digit.size}' for digit in view.digits)})" for view in self.views
        )
        span = "" if self.span == range(self.world_size) else f", span={_short(self.span)}"
        return f"{type(self).__name__}({sizes}{span}){views}"

    def show(self, axis: AxisName, *, file: TextIO | None = None, max_nodes: int = 16) -> None:
        """Print a picture of the groups along ``axis``: a row a node, a cell a rank, a letter or number a group.

        Args:
            axis: as for `axis`.
            file: where to; None is standard output. Coloured where it is a terminal and rich is installed.
            max_nodes: rows; the last line says how many more nodes there are.
        """
        from ._rehearse.show import show

        show(self, axis, file=file, max_nodes=max_nodes)

    def plot(
        self,
        axes: Sequence[AxisName] = (),
        path: str | os.PathLike[str] | None = None,
        *,
        max_nodes: int = 128,
        figsize: tuple[float, float] | None = None,
    ) -> Figure:
        """Draw the groups along ``axes``: nodes from left to right, the ranks of a node from top to bottom.

        Args:
            axes: one panel each; none means all that are in use.
            path: where to save the figure, in the format that its name ends with; None saves nothing.
            max_nodes: the nodes that are drawn, from the first; the picture says how many more there are.
            figsize: width and height in inches; None chooses.

        Returns:
            The figure. It is not registered with ``pyplot``.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from ._rehearse.plot import draw

        return draw(self, axes, path, max_nodes=max_nodes, figsize=figsize)

    def rehearse(self, *axes: AxisName, traffic: Mapping[AxisName, Traffic] | None = None) -> Rehearsal:
        """What this layout will make, without making it: groups, communicators, memory, bytes between nodes.

        Args:
            axes: along which there will be groups; none means all that are in use.
            traffic: as for `ParallelTopology.advise`; None is 1 GB along every axis.

        Returns:
            Figures that print as a report; ``as_dict()`` is for JSON.
        """
        from ._rehearse.rehearsal import rehearse

        return rehearse(self, axes, traffic)

    # Process groups

    def bind(
        self,
        *,
        backend: str | None = None,
        timeout: timedelta | float | None = None,
        pg_options: Any = None,
        warm_up: bool = False,
        axes: Mapping[AxisName, GroupOptions] | None = None,
    ) -> BoundTopology:
        """Process groups of this layout, made on first use. Makes nothing yet; no rank waits for another.

        Args:
            backend: of the groups; None is the default group's.
            timeout: of the groups' collectives, in seconds or as a timedelta; None is PyTorch's default.
            pg_options: the backend's own, such as ``ProcessGroupNCCL.Options()``, or a function that makes them.
            warm_up: use every group once when it is made.
            axes: axis -> what is different for its groups.

        Raises:
            NotInitializedError: there is no default process group.
            TopologyError: ``world_size`` is not that of the default process group, or an option is wrong.
        """
        from ._bound import BoundTopology

        return BoundTopology(self, backend=backend, timeout=timeout, pg_options=pg_options, warm_up=warm_up, axes=axes)

    # Inside

    @cached_property
    def _axes(self) -> dict[AxisName, Axis]:
        return {}

    @cached_property
    def _text(self) -> str:
        return json.dumps(self.as_dict())

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.span)}

    @cached_property
    def _digit(self) -> dict[str, Digit]:
        return {digit.name: digit for digit in self.digits}

    def _make_axis(self, name: AxisName) -> Axis:
        parts = parse_axis(name, self.names)
        atoms = [atom for part in parts for atom in self.aliases.get(part, (part,))]
        twice = [atom for atom in dict.fromkeys(atoms) if atoms.count(atom) > 1]
        if twice:
            raise TopologyError(f"axis {name!r} names {twice[0]} twice")
        spelled = name if isinstance(name, str) else "_".join(parts)
        view = next((view for view in self._every_view if any(self._only_in(view, atom) for atom in atoms)), None)
        if view is None:
            return Axis(self, spelled, base=[digit for digit in self.digits if digit.name in atoms])
        inside = {digit.name: digit for digit in view.digits}
        for atom in atoms:
            if atom not in inside and (atom not in self._digit or atom in view.over):
                other = next(atom for atom in atoms if self._only_in(view, atom))
                raise TopologyError(
                    f"axis {name!r} mixes {other} with {atom}: {', '.join(inside)} factor the ranks of "
                    f"{', '.join(view.over)} anew; take one of them out of the axis"
                )
        turned = [digit for digit in view.digits if digit.name in atoms]
        base = [digit for digit in self.digits if digit.name in atoms and digit.name not in inside]
        return Axis(self, spelled, base=base, view=view.digits, over=self._over(view), turned=turned)

    def _only_in(self, view: View, name: str) -> bool:
        return name not in self._digit and any(digit.name == name for digit in view.digits)

    def _over(self, view: View) -> list[tuple[Digit, Digit]]:
        """Each digit that the view factors, with its digit in the number that the view counts."""
        sources = [self._digit[name] for name in view.over]
        places = make_digits((digit.name, digit.size) for digit in sources)
        return list(zip(sources, places, strict=True))

    def _count(self, view: View, position: int) -> int:
        return sum(source.of(position) * place.stride for source, place in self._over(view))

    def _alias_digits(self, alias: str) -> tuple[Digit, ...]:
        """The digits of an alias, with their strides in its own coordinate."""
        everywhere = (*self.digits, *(digit for view in self._every_view for digit in view.digits))
        sizes = {digit.name: digit.size for digit in everywhere if digit.name in self.aliases[alias]}
        return make_digits(sizes.items())

    def _position_at(self, wanted: Mapping[str, int], view: View | None) -> int:
        values = dict(wanted)
        for alias in self.aliases:
            if alias in wanted:
                for place in self._alias_digits(alias):
                    values.setdefault(place.name, place.of(wanted[alias]))
        if view is not None:
            number = sum(values.get(digit.name, 0) * digit.stride for digit in view.digits)
            values.update({place.name: place.of(number) for _, place in self._over(view)})
        return sum(values.get(digit.name, 0) * digit.stride for digit in self.digits)

    def _check_names(self) -> None:
        digits = [digit.name for digit in self.digits]
        wrong = [name for name in self.names if not isinstance(name, str) or not name.isidentifier()]
        if wrong:
            raise TopologyError(f"{wrong[0]!r} cannot name an axis: names are identifiers, like 'tp' or 'dp_shard'")
        known = [set(digits), *({digit.name for digit in view.digits} for view in self._every_view)]
        for alias, names in self.aliases.items():
            if any(alias in one for one in known) or not any(set(names) <= one for one in known):
                spelled = " or ".join(", ".join(sorted(one)) for one in known)
                raise TopologyError(f"alias {alias!r}={names} must be a new name for some of {spelled}")
        taken: dict[str, View | None] = dict.fromkeys([*digits, *self.aliases])
        for view in self._every_view:
            for digit in view.digits:
                if digit.name not in taken:
                    taken[digit.name] = view
                elif not self._shares(view, digit, taken[digit.name]):
                    raise TopologyError(
                        f"{digit.name}={digit.size} of the view over {', '.join(view.over)} is another axis than the "
                        f"{digit.name} that the grid has; name it otherwise, or give it the same ranks"
                    )

    def _shares(self, view: View, digit: Digit, owner: View | None) -> bool:
        """Whether a digit of a view has the groups of the digit that the grid has under this name."""
        if owner is not None or digit.name not in self._digit:
            return False
        mine = Axis(self, digit.name, base=[], view=view.digits, over=self._over(view), turned=[digit])
        return mine.key == Axis(self, digit.name, base=[self._digit[digit.name]]).key


def check_size(name: str, size: Any) -> int:
    """The size as an int; `TopologyError` unless it is a positive integer."""
    if isinstance(size, bool) or not hasattr(size, "__index__") or operator.index(size) < 1:
        raise TopologyError(f"{name} must be a positive integer, got {size!r}")
    return operator.index(size)


def _node_view(ranks: Sequence[int], count: int, digits: Sequence[Digit], ranks_per_node: int | None) -> list[View]:
    if ranks_per_node is None:
        return []
    local = min(check_size("ranks_per_node", ranks_per_node), count)
    if count % local:
        raise DivisibilityError(f"ranks_per_node={ranks_per_node} must divide the {count} ranks of the grid")
    if not isinstance(ranks, range) or ranks.step != 1 or ranks.start % local:
        return []
    view = make_digits(zip(NODE_AXES, (local, count // local), strict=True))
    return [View(view, tuple(digit.name for digit in digits))]


def _short(ranks: Sequence[int]) -> str:
    if isinstance(ranks, range):
        return f"{ranks.start}..{ranks[-1]}" if ranks.step == 1 else str(ranks)
    return f"({', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''})"

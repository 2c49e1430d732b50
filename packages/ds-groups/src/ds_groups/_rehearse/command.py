"""The ``ds-groups`` command: rehearse a layout of ranks on any machine, without torch.

Exit codes: 0 done, 1 the picture cannot be made or written, 2 wrong usage, an impossible layout, or a rank outside it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, get_args

from ds_groups.__about__ import __version__
from ds_groups._describe import members
from ds_groups._presets import deepspeed, megatron, torchtitan
from ds_groups._topology import ParallelTopology, launched_world_size
from ds_groups.errors import MissingDependencyError, TopologyError, TopologyWarning

from .traffic import Pattern, Traffic

PRESETS: dict[str, Callable[..., ParallelTopology]] = {
    "plain": ParallelTopology,
    "megatron": megatron,
    "torchtitan": torchtitan,
    "deepspeed": deepspeed,
}
_SIZES = {
    "tp": "tensor parallel size",
    "cp": "context parallel size",
    "sp": "sequence parallel size",
    "pp": "pipeline parallel size",
    "dp": "data parallel size",
    "dp_shard": "data ranks that share one sharded copy",
    "dp_replicate": "sharded copies",
    "ep": "expert parallel size",
    "etp": "tensor parallel size of the experts",
    "hpz": "ranks of a secondary partition (hpZ) or of a MiCS shard group",
    "ranks_per_node": "ranks of one node",
}
_TEXTS = {
    "order": "axes from the fastest varying to the slowest, such as tp-cp-ep-dp-pp",
    "ep_axes": "axes whose ranks experts factor, such as tp-cp-dp",
    "experts": "ranks that experts factor: stage, lane or lane_by_lane",
}
_SWITCHES = {
    "data_before_expert": "ranks that hold the same experts are neighbours",
    "by_lane": "experts count the ranks of one tensor rank after those of another",
}
_SHOWN_GROUPS = 5
_SHOWN_WARNINGS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program's name; those of this process when left out.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        sys.stdout.write(_run(arguments) + "\n")
    except TopologyError as error:
        return _fail(error, 2)
    except (MissingDependencyError, OSError) as error:
        return _fail(error, 1)
    except ValueError as error:  # matplotlib does not know the ending of the picture's name
        return _fail(f"--picture {arguments.picture}: {error}", 1)
    return 0


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"ds-groups: {error}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-groups",
        description="Show which groups a layout of ranks makes, and what they cost, without starting any rank.",
        epilog="example: ds-groups --preset megatron --world 131072 --tp 8 --pp 16 --ep 8 --ranks-per-node 8",
    )
    parser.add_argument("--version", action="version", version=f"ds-groups {__version__}")
    parser.add_argument("--preset", choices=PRESETS, default="plain", help="whose layout (default: plain)")
    layout = parser.add_argument_group("layout (each preset takes some of these)")
    layout.add_argument("--world", type=int, metavar="N", help="ranks (default: what the launcher says)")
    for name, text in _SIZES.items():
        layout.add_argument(_flag(name), type=int, default=argparse.SUPPRESS, metavar="N", help=text)
    for name, text in _TEXTS.items():
        layout.add_argument(_flag(name), default=argparse.SUPPRESS, metavar="TEXT", help=text)
    for name, text in _SWITCHES.items():
        layout.add_argument(_flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
    output = parser.add_argument_group("output")
    output.add_argument("--axes", type=_names, default=(), metavar="A,B", help="axes (default: all in use)")
    output.add_argument(
        "--traffic",
        nargs="+",
        type=_traffic,
        default=(),
        metavar="AXIS=BYTES[:PATTERN]",
        help="bytes that a rank sends along an axis in a step, such as tp=4e9 ep=1e9:all-to-all; "
        f"patterns: {', '.join(get_args(Pattern))}",
    )
    output.add_argument(
        "--advise", action="store_true", help="compare the orders of the axes by --traffic, instead of the figures"
    )
    output.add_argument("--show", metavar="AXIS", help="the groups along an axis")
    output.add_argument("--all", action="store_true", help="with --show: all of them")
    output.add_argument("--rank", type=int, metavar="R", help="the coordinates of a rank, and its groups")
    output.add_argument("--json", action="store_true", help="everything as JSON")
    output.add_argument("--picture", metavar="FILE", help="draw the groups on their nodes; needs matplotlib")
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _traffic(text: str) -> tuple[str, Traffic]:
    axis, _, rest = text.partition("=")
    amount, _, pattern = rest.partition(":")
    try:
        number = float(amount)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be AXIS=BYTES or AXIS=BYTES:PATTERN, such as tp=4e9") from None
    return axis, (number, pattern) if pattern else number  # type: ignore[return-value]  # an unknown pattern is refused


def _run(arguments: argparse.Namespace) -> str:
    """The text that the command prints."""
    if arguments.all and arguments.show is None:
        raise TopologyError("--all needs --show AXIS: it prints every group along that axis")
    if arguments.advise and not arguments.traffic:
        raise TopologyError("--advise needs --traffic, such as --traffic tp=4e9 dp=1e9 ep=1e9:all-to-all")
    topology, warned = _topology(arguments)
    rehearsal = topology.rehearse(*arguments.axes, traffic=dict(arguments.traffic) or None)
    advice = topology.advise(dict(arguments.traffic)) if arguments.advise else None
    rank = arguments.rank
    coordinates = None if rank is None else topology.coordinates(rank)
    groups = {} if rank is None else {axis.axis: topology.ranks(axis.axis, rank) for axis in rehearsal.axes}
    shown: list[tuple[int, ...]] = []
    if arguments.show is not None:
        shown = list(islice(topology.groups(arguments.show), None if arguments.all else _SHOWN_GROUPS))
    if arguments.picture is not None:
        topology.plot(arguments.axes, arguments.picture)

    if arguments.json:
        found: dict[str, Any] = {"preset": arguments.preset, **rehearsal.as_dict(), "warnings": warned}
        if advice is not None:
            found["advice"] = advice.as_dict()
        if arguments.show is not None:
            found["shown"] = {"axis": arguments.show, "groups": shown}
        if rank is not None:
            found["rank"] = {"rank": rank, "coordinates": coordinates, "groups": groups}
        return json.dumps(found)
    report = str(rehearsal) if advice is None else f"{topology!r}\n{advice}"
    lines = [f"{arguments.preset}: {report}", *(f"warning: {text}" for text in warned[:_SHOWN_WARNINGS])]
    if arguments.show is not None:
        lines += ["", f"groups along {arguments.show}:", *_groups(topology, arguments.show, shown, arguments.all)]
    if coordinates is not None:
        places = ", ".join(f"{name} {place}" for name, place in coordinates.items())
        lines += ["", f"rank {rank}: {places}"]
        lines += [f"  {axis}: {members(group)}" for axis, group in groups.items()]
    return "\n".join(lines)


def _topology(arguments: argparse.Namespace) -> tuple[ParallelTopology, list[str]]:
    """The layout that was asked for, and the warnings that it gave."""
    make = PRESETS[arguments.preset]
    known = inspect.signature(make).parameters
    given = {name: getattr(arguments, name) for name in (*_SIZES, *_TEXTS, *_SWITCHES) if hasattr(arguments, name)}
    for name in given:
        if name not in known:
            flags = ", ".join(_flag(name) for name in (*_SIZES, *_TEXTS, *_SWITCHES) if name in known)
            raise TopologyError(f"--preset {arguments.preset} has no {_flag(name)}; it has {flags}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TopologyWarning)
        topology = make(_world() if arguments.world is None else arguments.world, **given)
    return topology, [str(one.message) for one in caught]


def _world() -> int:
    try:
        return launched_world_size()
    except TopologyError:
        raise TopologyError("--world is missing, and no launcher says how many ranks there are") from None


def _groups(topology: ParallelTopology, axis: str, shown: Sequence[tuple[int, ...]], whole: bool) -> list[str]:
    lines = [f"  {' '.join(map(str, group)) if whole else members(group)}" for group in shown]
    rest = len(topology.span) // topology.size(axis) - len(shown)
    return [*lines, *([f"  ... {rest} more; --all prints them"] if rest else [])]

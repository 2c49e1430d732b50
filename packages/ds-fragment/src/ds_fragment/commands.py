"""The command ``ds-fragment``: what is in checkpoints, what differs, ZeRO folders to files, and the kernels in use."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Literal

from ds_fragment.__about__ import __version__
from ds_fragment.errors import FragmentError
from ds_fragment.kernels import report
from ds_fragment.zero_checkpoint.command import add_consolidate

# What a command ends with.
_EQUAL, _DIFFERENT, _FAILED = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 0, 1 where checkpoints differ, 2 after an error.

    Args:
        argv: the arguments; those of the process unless told.
    """
    given = _parser().parse_args(argv)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (FragmentError, ImportError, OSError) as error:
        print(f"ds-fragment: {' '.join(str(error).split())}", file=sys.stderr)
        return _FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-fragment", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ds-fragment {__version__}")
    parser.set_defaults(run=_kernels)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    kernels = commands.add_parser("kernels", help="which kernels are in use, and why; also without a command")
    kernels.set_defaults(run=_kernels)

    shown = commands.add_parser("show", help="what is in a checkpoint")
    shown.add_argument("path", metavar="PATH", help="a safetensors file, an index, or a folder with either")
    shown.add_argument("--norms", action="store_true", help="read all tensors, and add the 2-norm of each")
    shown.set_defaults(run=_show)

    compared = commands.add_parser(
        "diff", help="what differs between two checkpoints", epilog="exit status: 0 equal, 1 different, 2 an error"
    )
    compared.add_argument("a", metavar="A", help="a safetensors file, an index, or a folder with either")
    compared.add_argument("b", metavar="B", help="likewise")
    compared.add_argument("--optimizer", action="store_true", help="compare the optimizer states beside them, too")
    compared.set_defaults(run=_diff)

    add_consolidate(commands)
    for each in (shown, compared):
        each.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _kernels(given: argparse.Namespace) -> int:
    lines = {"ds-fragment": __version__, **report()}
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    return 0


def _show(given: argparse.Namespace) -> int:
    from ds_fragment.checkpoint.inspect import show

    contents = show(given.path, norms=given.norms)
    if given.json:
        print(json.dumps(contents.to_dict(), indent=1))
    elif not _print_table(contents.table()):
        print(contents)
    else:
        print("\n".join(contents.summary()))
    return 0


def _diff(given: argparse.Namespace) -> int:
    from ds_fragment.checkpoint.inspect import diff

    found = diff(given.a, given.b, optimizer=given.optimizer)
    print(json.dumps(found.to_dict(), indent=1) if given.json else found)
    return _EQUAL if found.equal else _DIFFERENT


def _print_table(rows: Sequence[Sequence[str]]) -> bool:
    """Print a table for people; returns False, with nothing printed, without rich or where nobody looks."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table()
    for title in rows[0]:
        justify: Literal["left", "right"] = "right" if title in ("bytes", "norm") else "left"
        table.add_column(title, justify=justify, no_wrap=title not in ("name", "file"), overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console().print(table)
    return True

"""Write the tables of exchange.md and operations.md from the figures in exchange_*.json and operations_*.json.

python docs/benchmarks/make_page.py            # writes what stands between the markers of the pages
python docs/benchmarks/make_page.py --check    # writes nothing; exits with 1 where a page is out of date

One section for each machine, case and quantity, and one table in it. A file of another machine makes new sections;
nothing has to be registered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER / "exchange.md", FOLDER / "operations.md")
BEGIN, END = "<!-- tables: make_page.py writes them -->", "<!-- end of the tables -->"

# In the order of the page; other cases and quantities come behind them.
CASES = {
    "llama": "Llama-3.2-1B's 146 tensors, 1.24 G elements",
    "small": "600 tensors of 768 x 512, 236 M elements",
    "mixed": "100 tensors, 20 M elements",
    "tiny": "2,000 tensors of 1,000 elements",
}
QUANTITIES = {"value": "values", "lp": "lp weights", "grad": "gradients", "exp_avg": "`exp_avg`"}


@dataclass(frozen=True)
class Row:
    """What one contestant took in one run; times are medians in milliseconds."""

    run: str
    case: str
    quantity: str
    contestant: str
    median_ms: float
    to_fastest_peer: float | None
    to_bare: float | None
    peak_mib: int | None

    def cells(self) -> tuple[str, ...]:
        """The columns of the page."""
        name = f"**{self.contestant}**" if self.contestant.startswith("ds-fragment") else self.contestant
        times = f"{self.median_ms:,.1f}", _ratio(self.to_bare), _ratio(self.to_fastest_peer)
        return name, *times, "" if self.peak_mib is None else f"{self.peak_mib:,}", self.run


@dataclass(frozen=True)
class Run:
    """One file of figures."""

    name: str
    file: str
    command: str
    machine: str
    torch: str
    backend: str
    rounds: int
    rows: tuple[Row, ...]


HEAD = ("contestant", "ms", "to bare", "to peer", "MiB", "run")


def _ratio(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def read(path: Path) -> Run:
    """One file; keys that the page does not show are left alone."""
    found = json.loads(path.read_text(encoding="utf-8"))
    name, about = path.stem.partition("_")[2], found["about"]
    rows = tuple(
        Row(
            name,
            row["case"],
            row["quantity"],
            row["contestant"],
            row["median_ms"],
            row.get("to_fastest_peer"),
            row.get("to_bare"),
            row.get("peak_mib"),
        )
        for row in found["rows"]
    )
    return Run(
        name,
        path.name,
        about["command"],
        about["machine"],
        about["torch"],
        about.get("backend", ""),
        about.get("rounds", 0),
        rows,
    )


def _ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names without repetition: first the known ones in their order, then the others by the alphabet."""
    first, given = list(known), set(names)
    return [name for name in first if name in given] + sorted(given.difference(first))


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| {' | '.join(HEAD)} |"
    yield "|---|" + "---:|" * (len(HEAD) - 2) + "---|"
    for row in sorted(rows, key=lambda row: (row.median_ms, row.contestant, row.run)):
        yield f"| {' | '.join(row.cells())} |"


def tables(runs: Sequence[Run]) -> str:
    """All sections: a machine, its runs, and a table for each case and quantity."""
    lines: list[str] = []
    gpus_first = sorted({run.machine for run in runs}, key=lambda machine: ("CPU" in machine, machine))
    for machine in gpus_first:
        here = [run for run in runs if run.machine == machine]
        lines += [f"## {machine}", "", "The runs:", ""]
        for run in here:
            rounds = f", {run.rounds} rounds" if run.rounds else ""
            lines += [f"- `{run.name}` ([{run.file}]({run.file})): torch {run.torch}, {run.backend}{rounds}"]
        lines.append("")
        rows = [row for run in here for row in run.rows]
        for case in _ordered((row.case for row in rows), CASES):
            of_case = [row for row in rows if row.case == case]
            for quantity in _ordered((row.quantity for row in of_case), QUANTITIES):
                words = QUANTITIES.get(quantity, f"`{quantity}`")
                lines += [f"### {machine}, {case}: {words}", "", f"{CASES.get(case, case)}.", ""]
                lines += [*_table([row for row in of_case if row.quantity == quantity]), ""]
    lines += ["## Commands", "", "Each run can be repeated by its command, on such a machine:", "", "```text"]
    lines += [f"{run.command}" for run in runs]
    lines += ["```", ""]
    return "\n".join(lines)


def page(text: str, runs: Sequence[Run]) -> str:
    """The page with new tables in the place of what is between the markers.

    Raises:
        ValueError: it lacks one of the markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has not both of the markers {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{tables(runs)}\n{end}{after}"


def main() -> int:
    """Parse the command line; write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    options = parser.parse_args()
    stale = 0
    for target in PAGES:
        text = target.read_text(encoding="utf-8")
        new = page(text, [read(path) for path in sorted(FOLDER.glob(f"{target.stem}_*.json"))])
        if new == text:
            continue
        stale = 1
        if options.check:
            print(f"{target.name} is out of date: run python docs/benchmarks/make_page.py", file=sys.stderr)
        else:
            target.write_text(new, encoding="utf-8")
    return stale if options.check else 0


if __name__ == "__main__":
    sys.exit(main())

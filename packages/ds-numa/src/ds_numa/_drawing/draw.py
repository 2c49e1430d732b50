"""A machine, and which rank sits where, as a drawing of characters."""

from __future__ import annotations

import importlib
import shutil
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ds_numa._ranges import format_ranges

if TYPE_CHECKING:
    from ds_numa.plan import Plan
    from ds_numa.topology import Node, Topology

SYMBOLS = string.digits + string.ascii_lowercase + string.ascii_uppercase  # of ranks 0 to 61
FREE, IDLE, DENIED, SHARED, HIGHER = "#", ".", "x", "*", "+"
_COLUMNS = 100  # of a file that is no terminal
# Dark text on Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#BBBBBB")
KINDS = {
    "hbm": "high-bandwidth memory",
    "gpu": "memory of a GPU",
    "cxl": "memory expander",
    "ram": "memory without CPUs",
    "empty": "no CPUs, no memory",
    "unknown": "memory without CPUs, of unknown kind",
}

Line = list[tuple[str, "int | None"]]  # parts of a line, each with the rank whose colour it has


def show(machine: Topology, plan: Plan | None = None, *, file: TextIO | None = None) -> None:
    """What `Topology.show` prints."""
    out = sys.stdout if file is None else file
    console = _console(out)
    columns = shutil.get_terminal_size((_COLUMNS, 24)).columns if out.isatty() else _COLUMNS
    for line in drawing(machine, plan, columns):
        if console is None:
            out.write("".join(text for text, _ in line).rstrip() + "\n")
            continue
        text = importlib.import_module("rich.text").Text()
        for part, rank in line:
            text.append(part, "" if rank is None else f"black on {PALETTE[rank % len(PALETTE)]}")
        console.print(text, no_wrap=True, overflow="ignore", crop=False)


def _console(out: TextIO) -> Any:
    """Rich's console on a terminal where rich is installed, else None."""
    if not out.isatty():
        return None
    try:
        return importlib.import_module("rich.console").Console(file=out, highlight=False)
    except ImportError:
        return None


def drawing(machine: Topology, plan: Plan | None, columns: int = _COLUMNS) -> Iterator[Line]:
    """The lines of the drawing: sockets hold nodes, nodes hold caches, a cache is a row of cores."""
    yield _plain(_summary(machine))
    ranks = _ranks_of_cpus(plan)
    drawn: set[int] = set()  # nodes whose devices are there: a node may lie in several sockets
    for name, cpus in _sockets(machine):
        indent = "  " if name else ""
        if name:
            yield _plain(f"{name}: CPUs {format_ranges(cpus)}")
        for node in machine.nodes:
            part = cpus.intersection(node.cpus)
            if not part:
                continue
            yield from _draw_node(machine, node, part, plan, ranks, indent, columns)
            if node.id not in drawn:
                drawn.add(node.id)
                yield from _draw_devices(machine, node.id, plan, indent + "  ")
    for node in machine.nodes:
        if not node.cpus:
            near = f", nearest to node {format_ranges(node.initiators)}" if node.initiators else ""
            yield _plain(f"node {node.id}: {KINDS[node.kind]}{_size(node)}{near}{_denied(machine, node)}")
            yield from _draw_devices(machine, node.id, plan, "  ")
    yield from _draw_devices(machine, None, plan, "")
    yield from _draw_facts(machine)
    if plan is not None:
        yield from _draw_plan(plan)
    legend = _legend(machine, plan, ranks)
    if legend:
        yield _plain(legend)


def _summary(machine: Topology) -> str:
    counts = [(len(machine.sockets), "socket"), (len(machine.nodes) if machine.numa else 0, "node")]
    counts += [(len(machine.cores), "core"), (sum(map(len, machine.cores)), "CPU")]
    parts = [f"{number} {what}{'' if number == 1 else 's'}" for number, what in counts if number]
    nodes = "" if machine.numa else "; the kernel shows no NUMA nodes"
    return f"{', '.join(parts)}; allowed: CPUs {format_ranges(machine.allowed)}{nodes}"


def _sockets(machine: Topology) -> list[tuple[str, set[int]]]:
    """Each socket's name and CPUs; CPUs of no socket come last, without a name."""
    found = [(f"socket {i}", set(socket)) for i, socket in enumerate(machine.sockets)]
    rest = {cpu for core in machine.cores for cpu in core}.difference(*(cpus for _, cpus in found))
    return found + ([("CPUs of no known socket" if found else "", rest)] if rest else [])


def _draw_node(
    machine: Topology,
    node: Node,
    part: set[int],
    plan: Plan | None,
    ranks: dict[int, list[int]],
    indent: str,
    columns: int,
) -> Iterator[Line]:
    if machine.numa:
        whole = "" if part == set(node.cpus) else f" (of {format_ranges(node.cpus)})"
        title = f"{indent}node {node.id}: CPUs {format_ranges(part)}{whole}{_size(node)}{_denied(machine, node)}"
        yield _plain(title)
    allowed = set(machine.allowed)
    told = [part.intersection(cache) for cache in machine.l3]
    for name, groups in (("L3", told), ("cores", [part.difference(*machine.l3)])):
        rows = [[core for core in machine.cores if not cpus.isdisjoint(core)] for cpus in groups]
        cells = [[_cell(core, allowed, ranks, plan) for core in row] for row in rows if row]
        yield from _wrap(f"{indent}  {name:6}", cells, columns)


def _wrap(head: str, caches: Sequence[Sequence[tuple[str, int | None]]], columns: int) -> Iterator[Line]:
    """The caches of a node side by side, a space between two, on as many lines as they need."""
    width = max(8, columns - len(head))
    line: Line = []
    for cache in caches:
        used = sum(len(text) for text, _ in line)
        if line and used + 1 + len(cache) > width:
            yield [(head, None), *line]
            head, line, used = " " * len(head), [], 0
        for start in range(0, len(cache), width):
            if start:
                yield [(head, None), *line]
                head, line = " " * len(head), []
            line += [*([(" ", None)] if line else []), *_join(cache[start : start + width])]
    if line:
        yield [(head, None), *line]


def _cell(
    core: Sequence[int], allowed: set[int], ranks: dict[int, list[int]], plan: Plan | None
) -> tuple[str, int | None]:
    """One core's character, and the rank whose colour it has."""
    if allowed.isdisjoint(core):
        return DENIED, None
    if plan is None:
        return FREE, None
    here = sorted({rank for cpu in core for rank in ranks.get(cpu, ())})
    if not here:
        return IDLE, None
    if len(here) > 1:
        return SHARED, None
    return (SYMBOLS[here[0]] if here[0] < len(SYMBOLS) else HIGHER), here[0]


def _join(cells: Iterable[tuple[str, int | None]]) -> Line:
    """Neighbours of one colour as one part."""
    line: Line = []
    for text, rank in cells:
        if line and line[-1][1] == rank:
            line[-1] = (line[-1][0] + text, rank)
        else:
            line.append((text, rank))
    return line


def _draw_devices(machine: Topology, node: int | None, plan: Plan | None, indent: str) -> Iterator[Line]:
    users: dict[str, list[int]] = {}
    for binding in plan.bindings if plan else ():
        if binding.gpu is not None:
            users.setdefault(binding.gpu, []).append(binding.local_rank)
    unknown = " (node unknown)" if node is None else ""
    for index, gpu in enumerate(machine.gpus):
        if gpu.node == node:
            what = ", ".join(part for part in (gpu.pci, gpu.model or gpu.vendor) if part)
            mine = users.get(gpu.pci, [])
            head = f"{indent}GPU {index}: {what}{'' if gpu.usable else ' (not for this process)'}{unknown}"
            yield [(head + (" " if mine else ""), None), *((f" rank {rank} ", rank) for rank in mine)]
    for nic in machine.nics:
        if nic.node == node:
            yield _plain(f"{indent}{nic.kind} {'/'.join(nic.names) or '?'}: {nic.pci}{unknown}")


def _draw_facts(machine: Topology) -> Iterator[Line]:
    for index, cpus in enumerate(machine.core_classes):
        speed = "the fastest" if index == 0 else "slower ones"
        yield _plain(f"kind {index + 1} of cores, {speed}: CPUs {format_ranges(cpus)}")
    if machine.cpu_quota is not None:
        yield _plain(f"quota of the cgroup: the time of {machine.cpu_quota:g} CPUs")
    for note in machine.notes:
        yield _plain(f"note: {note}")


def _draw_plan(plan: Plan) -> Iterator[Line]:
    for text in str(plan).splitlines():
        yield _plain(text)


def _legend(machine: Topology, plan: Plan | None, ranks: dict[int, list[int]]) -> str:
    allowed = set(machine.allowed)
    cells = {_cell(core, allowed, ranks, plan)[0] for core in machine.cores}
    words = {
        FREE: "a core",
        IDLE: "an idle core",
        DENIED: "a core that this process may not use",
        SHARED: "a core of several ranks",
        HIGHER: f"a core of a rank from {len(SYMBOLS)} on",
    }
    found = [f"{symbol} {text}" for symbol, text in words.items() if symbol in cells]
    if plan is not None and not cells <= set(words):
        symbol = "a digit" if len(plan) <= 10 else "a digit or letter (a = 10, A = 36)"
        found.insert(0, f"{symbol} is a core of that rank")
    return ", ".join(found)


def _ranks_of_cpus(plan: Plan | None) -> dict[int, list[int]]:
    ranks: dict[int, list[int]] = {}
    for binding in plan.bindings if plan else ():
        for cpu in binding.cpus:
            ranks.setdefault(cpu, []).append(binding.local_rank)
    return ranks


def _size(node: Node) -> str:
    return "" if node.memory_bytes is None or node.kind == "empty" else f", {node.memory_bytes / 2**30:.1f} GiB"


def _denied(machine: Topology, node: Node) -> str:
    denied = machine.allowed_memory is not None and node.id not in machine.allowed_memory and node.kind != "empty"
    return " (memory not allowed)" if denied else ""


def _plain(text: str) -> Line:
    return [(text, None)]

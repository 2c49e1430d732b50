"""What a run of nox says last: how many tests ran, what was skipped and why, which interpreters are missing.

A session that ran pytest left its counts in a JUnit file; any other session counts as one check.
"""

from __future__ import annotations

import json
import re
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STARTED = time.time()


@dataclass
class Summary:
    """The counts of one run."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    missing: set[str] = field(default_factory=set)  # interpreters
    failures: list[str] = field(default_factory=list)
    sessions: int = 0


def results_file(cache: Path, session: str) -> Path:
    """Where the session of this name writes its JUnit results."""
    return cache / "results" / (re.sub(r"[^\w.]+", "-", session).strip("-") + ".xml")


def summarize(cache: Path, sessions: list[dict[str, Any]], *, since: float = 0.0) -> Summary:
    """Add up what nox reported and what the sessions' tests left.

    Args:
        cache: the folder that holds the results.
        sessions: the entry ``sessions`` of nox's report.
        since: results older than this, in seconds of `time.time`, belong to an earlier run.
    """
    summary = Summary()
    for session in sessions:
        name, reason = session["signatures"][0], session.get("reason") or "no reason given"
        if session["result"] == "skipped":
            interpreter = re.search(r"[Ii]nterpreter (\S+) not found", reason)
            if interpreter:
                summary.missing.add(interpreter[1])
            else:
                summary.skipped[reason] += 1
            continue
        summary.sessions += 1
        results = results_file(cache, name)
        failed_before = summary.failed
        if results.exists() and results.stat().st_mtime >= since:
            _add_results(summary, name, ET.parse(results).getroot())
        elif session["result"] == "success":
            summary.passed += 1
        if session["result"] != "success" and summary.failed == failed_before:
            summary.failed += 1
            summary.failures.append(name)
    return summary


def write(cache: Path) -> None:
    """Print the summary of the run that ends now; nothing where no session ran."""
    report = cache / "report.json"
    if not report.exists() or report.stat().st_mtime < _STARTED:
        return
    summary = summarize(cache, json.loads(report.read_text())["sessions"], since=_STARTED)
    sys.stderr.flush()
    sys.stdout.write(render(summary) + "\n")
    sys.stdout.flush()


def render(summary: Summary) -> str:
    """The summary as text; its last line is ``N passed, N failed, N skipped``."""
    lines = ["", f"sessions that ran: {summary.sessions}"]
    lines += [f"failed: {name}" for name in summary.failures]
    lines += [f"skipped {count}: {reason}" for reason, count in sorted(summary.skipped.items())]
    if summary.missing:
        lines.append(f"missing interpreters, their sessions did not run: Python {', '.join(sorted(summary.missing))}")
    lines.append(f"{summary.passed} passed, {summary.failed} failed, {summary.skipped.total()} skipped")
    return "\n".join(lines)


def _add_results(summary: Summary, session: str, root: ET.Element) -> None:
    for case in root.iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            summary.failed += 1
            summary.failures.append(f"{session}: {case.get('classname')}.{case.get('name')}")
        elif skipped is not None:
            summary.skipped[f"{session.partition('(')[2].rstrip(')') or session}: {skipped.get('message')}"] += 1
        else:
            summary.passed += 1

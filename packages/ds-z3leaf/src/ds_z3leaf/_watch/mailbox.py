"""Reports and verdicts, through a connection of one's own to the store that the ranks met in. No collective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d as c10d

from ds_z3leaf._watch.diagnosis import Verdict
from ds_z3leaf._watch.history import Report

PREFIX = "ds_z3leaf_watch"
_WAIT = timedelta(seconds=10)


class Mailbox:
    """What the ranks of one `watch` leave for each other.

    Every question has a number, so that one that found nothing does not answer the next.

    Args:
        ranks: the global ranks that watch together.
        rank: this one.
    """

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self._ranks = ranks
        self._rank = rank
        store: Any = c10d._get_default_store()
        try:
            store = store.clone()
        except (AttributeError, RuntimeError, NotImplementedError):  # older torch, or a store without connections
            pass
        else:
            store.set_timeout(_WAIT)
        group = hashlib.blake2b(str(list(ranks)).encode(), digest_size=6).hexdigest()
        store = c10d.PrefixStore(f"{PREFIX}/{group}", store)
        run = store.add(f"runs/{rank}", 1)  # how often this rank has entered watch() with these ranks
        self._store: Any = c10d.PrefixStore(str(run), store)

    def ask(self, question: int) -> None:
        """Have every rank report."""
        self._store.set(f"{question}/asked", "")

    def asked(self, question: int) -> bool:
        """Whether any rank has asked."""
        return bool(self._store.check([f"{question}/asked"]))

    def put(self, question: int, report: Report) -> None:
        """Leave this rank's report."""
        self._store.set(f"{question}/report/{self._rank}", report.pack())

    def leave(self, report: Report) -> None:
        """Leave this rank's last report; it answers no more."""
        self._store.set(f"left/{self._rank}", report.pack())

    def first(self) -> int:
        """The first rank that is still there, which compares the reports."""
        return next((rank for rank in self._ranks if not self._store.check([f"left/{rank}"])), self._rank)

    def collect(self, question: int, known: dict[int, Report]) -> dict[int, Report]:
        """The reports there are, besides those known."""
        found = dict(known)
        for rank in self._ranks:
            for key in (f"{question}/report/{rank}", f"left/{rank}"):
                if rank not in found and self._store.check([key]):
                    found[rank] = Report.unpack(self._store.get(key))
        return found

    def decide(self, question: int, verdict: Verdict) -> None:
        """Tell every rank what the reports say."""
        self._store.set(f"{question}/verdict", json.dumps(asdict(verdict)))

    def verdict(self, question: int) -> Verdict | None:
        """What the reports say, if a rank has compared them."""
        key = f"{question}/verdict"
        return Verdict(**json.loads(self._store.get(key))) if self._store.check([key]) else None

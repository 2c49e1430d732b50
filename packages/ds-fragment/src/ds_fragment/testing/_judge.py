"""One cell on this rank, from a fresh engine to a verdict; and what the verdicts of all ranks come to."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_fragment.errors import FragmentError
from ds_fragment.testing._cells import Cell
from ds_fragment.testing._engine import Engine
from ds_fragment.testing._lockstep import Lockstep, Unsupported
from ds_fragment.testing._net import UNUSED, USED
from ds_fragment.testing._operations import READS, WRITES, Found, read_again

_SEED = 7


@dataclass(frozen=True)
class Verdict:
    """What one rank found: ``equal``, ``error``, ``different``, ``untyped``, ``hang`` or ``none``.

    Attributes:
        result: one of these words.
        detail: the error's class where it is ``error``, else what happened.
        digest: of the bits that were read, which all ranks must have alike.
        text: what the error says.
    """

    result: str
    detail: str = ""
    digest: str = ""
    text: str = ""


def judge(engine: Engine, cell: Cell) -> Verdict:
    """Try one cell. All ranks of the engine must call it."""
    side: Lockstep | None = None
    try:
        with contextlib.ExitStack() as stack:
            side = Lockstep(engine, _SEED)
            side.reach(cell.moment, stack)
            if side.differences:
                return Verdict("different", f"before the operation: {side.differences[0]}")
            try:
                found = _operate(side, cell)
            except FragmentError as error:
                found, verdict = {}, Verdict("error", type(error).__name__, text=str(error))
            else:
                verdict = _verdict(side, cell, found)
        if verdict.result in ("equal", "error"):
            side.go_on(cell.moment, redo=cell.quantity == "value" and cell.writes)
            if side.differences:
                refused = f" (after {verdict.detail})" if verdict.result == "error" else ""
                return Verdict("different", side.differences[0] + refused)
        return verdict
    except Unsupported:
        return Verdict("none")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:200]
        return Verdict("untyped", f"{type(error).__name__}: {text} ({where.filename.split('/')[-1]}:{where.lineno})")
    finally:
        if side is not None:
            side.training.close()


def _operate(side: Lockstep, cell: Cell) -> Found:
    return (WRITES if cell.writes else READS)[cell.operation](side.training, cell.quantity)


def _verdict(side: Lockstep, cell: Cell, found: Found) -> Verdict:
    """After an operation that raised nothing: whether what was read, or is read now, is right."""
    right = side.oracle.held(cell.quantity)
    if cell.quantity == "grad" and not right:
        stale = "what is written is lost" if cell.writes else "what is read is stale"
        return Verdict("different", f"no error, though there is no gradient: {stale}") if found else Verdict("equal")
    if not cell.writes:
        return _compared(side, cell.quantity, found, {*right, *found}, exact={})
    for name, value in found.items():
        right[name] = value.double()
    try:
        again = read_again(side.training, cell.quantity)
    except FragmentError as error:
        return Verdict("different", f"written, and to read it is a {type(error).__name__}")
    return _compared(side, cell.quantity, again, {*right, *again}, exact=found)


def _compared(side: Lockstep, quantity: str, found: Found, names: set[str], exact: Found) -> Verdict:
    right = side.oracle.held(quantity)
    for name in sorted(names):
        if name not in found:
            if name in USED or quantity == "value":
                return Verdict("different", f"{name} is missing")
            continue
        zeros = torch.zeros_like(found[name], dtype=torch.float64)
        if name in exact:
            same = torch.equal(found[name].float().cpu(), exact[name].float().cpu())
        else:
            same = side.close(found[name], right.get(name, zeros) if name != UNUSED or quantity == "value" else zeros)
        if not same:
            kind = "is not what was written" if name in exact else "is not the oracle's"
            return Verdict("different", f"{name} {kind}{_off(found[name], right.get(name, zeros))}")
    return Verdict("equal", digest=_digest(found))


def _off(found: torch.Tensor, right: torch.Tensor) -> str:
    if found.shape != right.shape:
        return f": shape {tuple(found.shape)} for {tuple(right.shape)}"
    return f" (off by {(found.double() - right.double()).abs().max().item():.2g})"


def _digest(found: Found) -> str:
    digest = hashlib.sha256()
    for name in sorted(found):
        tensor = found[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """What the verdicts of all ranks come to: anything but the same on all of them is a defect."""
    first = verdicts[0]
    for word in ("hang", "untyped"):
        if any(verdict.result == word for verdict in verdicts):
            return Verdict(word, _told(verdicts))
    if len({(verdict.result, verdict.detail if verdict.result == "error" else "") for verdict in verdicts}) > 1:
        return Verdict("different", _told(verdicts))
    if len({verdict.digest for verdict in verdicts}) > 1:
        return Verdict("different", "the ranks read different bits")
    return first


def _told(verdicts: Sequence[Verdict]) -> str:
    texts = [verdict.result + (f" {verdict.detail}" if verdict.detail else "") for verdict in verdicts]
    if len(set(texts)) == 1:
        return verdicts[0].detail
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))

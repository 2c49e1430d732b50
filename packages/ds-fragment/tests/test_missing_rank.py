"""A rank that does not call, or calls something else: the others are told what they waited for."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, attach, iter_full, set_many
from fragment_oracle import ragged, raised
from ranks import run_ranks


def _away(rank: int) -> list[Any]:
    found = []
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    attach(model)
    group = dist.group.WORLD
    assert group is not None
    if rank == 0:
        group._get_backend(torch.device("cpu"))._set_default_timeout(__import__("datetime").timedelta(seconds=0.5))
        found.append(raised(lambda: list(iter_full(model, "value"))))
        found.append(raised(lambda: set_many([(model.weight, torch.ones(5, 3))])))
    else:
        time.sleep(2.5)
    del partition
    return found


def test_who_waits_in_vain_is_told_for_what() -> None:
    waiting, _ = run_ranks(_away, 2, timeout=20)
    (kind, text), (kind_of_write, text_of_write) = waiting
    assert kind == kind_of_write == "FragmentError"
    assert "the exchange of 'value' of parameter 'tiny', parameter 'weight', parameter 'empty', ... broke off" in text
    assert "a rank died, or did not make the same call" in text
    assert "the exchange of 'value' of parameter 'weight' broke off" in text_of_write


def _died(rank: int) -> list[Any]:
    model = ragged(torch.bfloat16)
    partition = FlatPartition(model.parameters())
    attach(model)
    if rank == 1:
        import os

        os._exit(1)
    found = raised(lambda: list(iter_full(model, "value")))
    del partition
    return [found]


def test_who_waits_for_the_dead_is_told_for_what() -> None:
    (waiting, _) = run_ranks(_died, 2, timeout=20, killed=(1,))
    ((kind, text),) = waiting
    assert kind == "FragmentError"
    assert "the exchange of 'value' of parameter 'tiny'" in text

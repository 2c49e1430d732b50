"""Several collectives at once, over backends that take them together and over those that do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ds_fragment._collectives import all_gather_many, broadcast_many, coalesces
from ranks import run_ranks


@pytest.mark.parametrize(("backend", "together"), [({"supports_coalescing": True}, True), ({}, False)])
def test_only_backends_that_can_are_given_several_at_once(backend: dict[str, bool], together: bool) -> None:
    group = cast(Any, SimpleNamespace(_get_backend=lambda device: SimpleNamespace(**backend)))
    assert coalesces(group, torch.device("meta")) is together
    assert not coalesces(group, torch.device("cpu"))


def _many(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    for count in (1, 3):
        inputs = [torch.full((4 + i,), 10 * rank + i, dtype=torch.uint8) for i in range(count)]
        outputs = [torch.empty(ranks * len(given), dtype=torch.uint8) for given in inputs]
        for work in all_gather_many(outputs, inputs, group):
            work.wait()
        for i, output in enumerate(outputs):
            assert output.tolist() == [10 * sender + i for sender in range(ranks) for _ in range(4 + i)]
    parts = [(sender, torch.full((3,), 7 * rank + sender, dtype=torch.uint8)) for sender in (ranks - 1, 0)]
    for work in broadcast_many(parts, group):
        work.wait()
    assert [part.tolist() for _, part in parts] == [[8 * (ranks - 1)] * 3, [0] * 3]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_everything(ranks: int) -> None:
    run_ranks(_many, ranks, ranks)

"""Bad input on one rank alone: the same typed error on every rank, and not a bit changed on any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import (
    FlatPartition,
    attach,
    get_local,
    iter_full,
    set_local,
    set_many,
    tensor_fragment as names,
    update_many,
)
from fragment_oracle import Ragged, ragged, raised, snapshot, unchanged
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

TIMEOUT = 30.0  # half of it is what a collective waits: an error in its place comes at once


class Run:
    """A model in training, between the gradient's reduction and the step."""

    def __init__(self, rank: int, engine: str) -> None:
        self.rank, self.model = rank, ragged(fsdp2=engine != "flat")
        self.partition: FlatPartition | None = None
        if engine == "flat":
            self.partition = FlatPartition(self.model.bfloat16().parameters())
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW([self.partition.hp_param])
        elif engine == "fsdp2":
            fully_shard(self.model)
            self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        else:  # two rows of replicas
            mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
            fully_shard(self.model, mesh=mesh)
            self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        attach(self.model, self.optimizer)
        self.backward()
        self.optimizer.step()
        if self.partition is not None:
            self.partition.publish()
        self.backward()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        dtype = torch.bfloat16 if self.partition is not None else torch.float32
        self.model(torch.ones(2, 5, dtype=dtype)).float().sum().backward()
        if self.partition is not None:
            self.partition.reduce_gradients()

    def state(self) -> list[torch.Tensor]:
        return snapshot(self.model, self.optimizer)

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        params = self.optimizer.param_groups[0]["params"]
        return torch.optim.AdamW(params)


Call = Callable[[Run, bool], object]  # whether this rank is the bad one
PLAIN = torch.ones(5, 3)


def write(value: object, good: torch.Tensor = PLAIN, what: str = "value") -> Call:
    return lambda run, bad: set_many([(run.model.weight, value if bad else good)], what)  # type: ignore[list-item]


def raising(key: object, whole: torch.Tensor, bad: bool) -> torch.Tensor:
    if bad:
        raise ZeroDivisionError("no")
    return whole + 1


def local(change: Callable[[torch.Tensor], object], what: str) -> Call:
    def call(run: Run, bad: bool) -> None:
        mine = get_local(run.model.long, what).clone()
        set_local(run.model.long, change(mine) if bad else mine + 1, what)  # type: ignore[arg-type]

    return call


def without_optimizer(read: Callable[[nn.Parameter, str], object], key: str) -> Call:
    """The bad rank's optimizer was not attached, or has not stepped."""

    def call(run: Run, bad: bool) -> None:
        if bad:
            fresh = run.fresh_optimizer()
            attach(None, fresh)
        try:
            read(run.model.weight, key)
        finally:
            attach(None, run.optimizer)

    return call


def without_gradient(act: Callable[[Ragged], object]) -> Call:
    def call(run: Run, bad: bool) -> None:
        held = run.model.weight.grad
        if run.partition is not None:  # a backward pass of which the reduction is missing
            run.model.weight.grad = torch.ones_like(run.model.weight) if bad else None
        elif bad:
            run.model.weight.grad = None
        try:
            act(run.model)
        finally:
            run.model.weight.grad = held

    return call


def many(bad_value: object) -> Call:
    def call(run: Run, bad: bool) -> None:
        params = [run.model.tiny, run.model.weight, run.model.empty, run.model.long, run.model.bias]
        values = [torch.zeros(param.shape) for param in params]
        if bad:
            values[3] = bad_value  # type: ignore[call-overload]
        set_many(zip(params, values, strict=True))

    return call


CASES: dict[str, tuple[str, Call]] = {
    "wrong shape": ("InvalidValueError", write(torch.ones(3, 5))),
    "wrong shape of as many elements": ("InvalidValueError", write(torch.ones(15))),
    "longer, as ZeRO-1 takes it": ("InvalidValueError", write(torch.ones(10, 3))),
    "integers": ("InvalidValueError", write(torch.ones(5, 3, dtype=torch.int64))),
    "complex": ("InvalidValueError", write(torch.ones(5, 3, dtype=torch.complex64))),
    "sparse": ("InvalidValueError", write(torch.eye(5)[:, :3].to_sparse())),
    "no tensor": ("InvalidValueError", write([[1.0] * 3] * 5)),
    "nothing": ("InvalidValueError", write(None)),
    "another value": ("RankMismatchError", write(torch.ones(5, 3) * 2)),
    "one bit": ("RankMismatchError", write(torch.zeros(5, 3), good=torch.tensor([[-0.0, 0, 0]] + [[0.0] * 3] * 4))),
    "another order": ("RankMismatchError", write(torch.arange(15.0).flip(0).view(5, 3), torch.arange(15.0).view(5, 3))),
    "wrong gradient": ("InvalidValueError", write(torch.ones(3, 5), what="grad")),
    "another gradient": ("RankMismatchError", write(torch.zeros(5, 3), what="grad")),
    "wrong state": ("InvalidValueError", write(torch.ones(3), what="exp_avg")),
    "wrong step": ("InvalidValueError", write(torch.ones(2), torch.tensor(3.0), "step")),
    "another step": ("RankMismatchError", write(torch.tensor(4.0), torch.tensor(3.0), "step")),
    "one of many": ("InvalidValueError", many(torch.zeros(7, 12))),
    "one of many is another": ("RankMismatchError", many(torch.ones(7, 11))),
    "a shorter piece": ("InvalidValueError", local(lambda mine: mine[:-1] if len(mine) else mine.new_ones(1), "value")),
    "a piece of integers": ("InvalidValueError", local(lambda mine: mine.new_ones(9, dtype=torch.int32), "grad")),
    "a piece that is no tensor": ("InvalidValueError", local(lambda mine: 3.0, "exp_avg")),
    "unknown state": ("StateKeyError", lambda run, bad: names.safe_get_full_optimizer_state(run.model.weight, "nope")),
    "unknown state to write": ("StateKeyError", lambda run, bad: set_many([(run.model.weight, PLAIN)], "nope")),
    "unknown state in bulk": ("StateKeyError", lambda run, bad: list(iter_full([run.model.weight], "nope"))),
    "unknown state on one rank": (
        "StateKeyError",
        lambda run, bad: names.safe_get_full_optimizer_state(run.model.weight, "nope" if bad else "exp_avg"),
    ),
    "step against a state": (
        "RankMismatchError",
        lambda run, bad: names.safe_get_full_optimizer_state(run.model.weight, "step" if bad else "exp_avg"),
    ),
    "state before the first step": (
        "StateNotReadyError",
        without_optimizer(names.safe_get_full_optimizer_state, "exp_avg"),
    ),
    "step before the first step": (
        "StateNotReadyError",
        without_optimizer(names.safe_get_full_optimizer_state, "step"),
    ),
    "state in bulk": ("StateNotReadyError", without_optimizer(lambda p, key: list(iter_full([p], key)), "exp_avg")),
    "state to write": (
        "StateNotReadyError",
        without_optimizer(lambda p, key: names.safe_set_full_optimizer_state(p, PLAIN, key), "exp_avg"),
    ),
    "step to write": (
        "StateNotReadyError",
        without_optimizer(lambda p, key: names.safe_set_full_optimizer_state(p, torch.tensor(1.0), key), "step"),
    ),
    "no gradient": ("GradientUnavailableError", without_gradient(lambda m: names.safe_get_full_grad(m.weight))),
    "no gradient in bulk": (
        "GradientUnavailableError",
        without_gradient(lambda m: list(iter_full([m.tiny, m.long, m.weight, m.bias], "grad", bucket_bytes=8))),
    ),
    "no gradient to write": (
        "GradientUnavailableError",
        without_gradient(lambda m: names.safe_set_full_grad(m.weight, PLAIN)),
    ),
    "no gradient to update": (
        "GradientUnavailableError",
        without_gradient(lambda m: names.safe_update_full_grad_vectorized([m.tiny, m.weight], lambda g, p: g * 2)),
    ),
    "fn raises": (
        "FragmentError",
        lambda run, bad: update_many(
            run.model, lambda key, whole: raising(key, whole, bad and key == "long"), bucket_bytes=16
        ),
    ),
    "fn raises at the first": (
        "FragmentError",
        lambda run, bad: update_many(run.model, lambda key, whole: raising(key, whole, bad), bucket_bytes=1 << 20),
    ),
    "fn returns another shape": (
        "InvalidValueError",
        lambda run, bad: update_many([run.model.long], lambda _, whole: whole[:1] if bad else whole * 2),
    ),
    "fn returns no tensor": (
        "InvalidValueError",
        lambda run, bad: update_many([run.model.long], lambda _, whole: 1.0 if bad else whole * 2),  # type: ignore[arg-type,return-value]
    ),
    "fn returns another value": (
        "RankMismatchError",
        lambda run, bad: update_many([run.model.long], lambda _, whole: whole * (3 if bad else 2)),
    ),
    "fn leaves it on one rank": (
        "RankMismatchError",
        lambda run, bad: update_many([run.model.long], lambda _, whole: None if bad else whole * 0),
    ),
    "what is no string": (
        "InvalidValueError",
        lambda run, bad: names.safe_get_full_optimizer_state(run.model.weight, 3),
    ),  # type: ignore[arg-type]
}

BAD_ON_EVERY_RANK = {"unknown state", "unknown state to write", "unknown state in bulk", "what is no string"}
READ_IN_A_ROW = {"no gradient", "no gradient in bulk"}  # each row of replicas reads for itself: the other goes on


def _one_after_the_other(rank: int, engine: str) -> dict[str, list[Any]]:
    run, found = Run(rank, engine), {}
    before = run.state()
    for name, (_, call) in CASES.items():
        found[name] = []
        for bad_rank in range(dist.get_world_size()):
            found[name].append(raised(lambda call=call, bad_rank=bad_rank: call(run, rank == bad_rank)))
            assert unchanged(before, run.model, run.optimizer), (name, bad_rank)
    # And after all that, reading and writing work.
    set_many([(run.model.weight, PLAIN)])
    assert torch.equal(names.safe_get_full_fp32_param(run.model.weight), PLAIN)
    assert isinstance(run.model.weight, DTensor) == (engine != "flat")
    return found


@pytest.mark.parametrize(("engine", "ranks"), [("flat", 2), ("flat", 3), ("fsdp2", 2), ("hybrid", 4)])
def test_the_same_error_on_every_rank_and_nothing_changed(engine: str, ranks: int) -> None:
    everybodys = run_ranks(_one_after_the_other, ranks, engine, timeout=TIMEOUT * 2)
    for name, (kind, _) in CASES.items():
        for bad_rank in range(ranks):
            told = [found[name][bad_rank] for found in everybodys]
            if engine == "hybrid" and name in READ_IN_A_ROW:
                row = slice(bad_rank // 2 * 2, bad_rank // 2 * 2 + 2)
                assert told[: row.start] + told[row.stop :] == [None, None], (name, told)
                told = told[row]
            assert told[0] is not None, (name, bad_rank)
            assert all(one == told[0] for one in told), (name, told)
            assert told[0][0] == kind, (name, bad_rank, told)
            if kind != "RankMismatchError" and name not in BAD_ON_EVERY_RANK:
                assert told[0][1].startswith(f"rank {bad_rank}: "), (name, bad_rank, told)


def _piece_missing(rank: int) -> list[Any]:
    """The partition was deleted on one rank alone, or its fragment taken away."""
    found = []
    for bad_rank in range(2):
        model = ragged(torch.bfloat16)
        partition = FlatPartition(model.parameters())
        optimizer = torch.optim.SGD([partition.hp_param], lr=0.1)
        attach(model, optimizer)
        before = snapshot(model)
        long = model.long  # on both ranks
        mapping = long._hp_mapping
        assert mapping is not None
        if rank == bad_rank:
            long._hp_mapping = None
        found.append(raised(lambda long=long: names.safe_get_full_fp32_param(long)))
        found.append(raised(lambda long=long: names.safe_set_full_fp32_param(long, torch.ones(7, 11))))
        long._hp_mapping = mapping
        if rank == bad_rank:
            del partition, optimizer
        found.append(raised(lambda long=long: names.safe_get_full_fp32_param(long)))
        found.append(raised(lambda long=long: names.safe_set_full_fp32_param(long, torch.ones(7, 11))))
        found.append(raised(lambda long=long: names.safe_get_full_grad(long)))
        found.append(raised(lambda long=long: names.safe_get_full_optimizer_state(long, "momentum_buffer")))
        assert unchanged(before, model)
    return found


def test_a_piece_that_is_missing_on_one_rank() -> None:
    mine, other = run_ranks(_piece_missing, 2, timeout=TIMEOUT)
    assert mine == other
    kinds = [error and error[0] for error in mine]
    assert kinds[:4] == ["FragmentError"] * 2 + ["UnlinkedParameterError"] * 2
    assert all(error is not None for error in mine)
    assert "0 elements are here where its layout says" in mine[0][1]
    assert "was deleted" in mine[2][1]


def _gradient_of_a_replica_missing(rank: int) -> list[Any]:
    """The last one, so that nothing travels after it, and alone."""
    mesh = init_device_mesh("cpu", (2,))
    dense = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    copied = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    found = []
    for turn in range(3):
        for param in (dense, copied):
            param.grad = torch.ones_like(param)
        if turn == 1 and rank == 1:
            copied.grad = None
        calls: list[Callable[[], object]] = [
            lambda: list(iter_full([dense, copied], "grad", bucket_bytes=1)),
            lambda: list(iter_full([copied], "grad")),
            lambda: names.safe_get_full_grad(copied),
        ]
        found.append([raised(call) for call in calls])
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == 2
    return found


def test_a_gradient_that_is_missing_on_one_of_the_replicas() -> None:
    mine, other = run_ranks(_gradient_of_a_replica_missing, 2, timeout=TIMEOUT)
    assert mine == other
    assert mine[0] == mine[2] == [None] * 3
    for kind, text in mine[1]:
        assert kind == "GradientUnavailableError"
        assert text.startswith("rank 1: ")


def _replicas(rank: int) -> list[Any]:
    """A fully replicated DTensor belongs to its mesh: a bad value on one rank is everybody's error."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    found = [raised(lambda: names.safe_set_full_fp32_param(param, torch.ones(3 if rank else 4)))]
    found.append(raised(lambda: names.safe_set_full_fp32_param(param, torch.ones(4) * rank)))
    assert param.to_local().abs().sum() == 0
    names.safe_set_full_fp32_param(param, torch.ones(4))
    assert torch.equal(param.to_local(), torch.ones(4))
    return found


def test_replicas_are_written_alike_or_not_at_all() -> None:
    mine, other = run_ranks(_replicas, 2, timeout=TIMEOUT)
    assert mine == other
    assert [kind for kind, _ in mine] == ["InvalidValueError", "RankMismatchError"]


def _groups_with_values_of_their_own(rank: int) -> list[Any]:
    """Experts differ between groups of ranks, the rest does not: each is compared where it should be the same."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    dense, expert = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))
    whole, part = FlatPartition([dense]), FlatPartition([expert], pair)
    mine = torch.full((3,), float(rank // 2))
    set_many([(dense, torch.ones(5)), (expert, mine)])
    assert torch.equal(names.safe_get_full_fp32_param(expert), mine)
    update_many([dense, expert], lambda _, value: value + 1)
    found = []
    for bad_rank in range(4):
        bad = torch.full((3,), 7.0) if rank == bad_rank else mine
        found.append(raised(lambda bad=bad: set_many([(dense, torch.zeros(5)), (expert, bad)])))
        fn = lambda key, value, bad_rank=bad_rank: raising(key, value, key is expert and rank == bad_rank)  # noqa: E731
        found.append(raised(lambda fn=fn: update_many([dense, expert], fn, bucket_bytes=1)))
        found.append(raised(lambda fn=fn: update_many([expert, dense], fn, bucket_bytes=1)))
        expert.grad = torch.ones(3) if rank == bad_rank else None  # unreduced in one pair, in the last bucket
        found.append(raised(lambda: update_many([dense, expert], lambda _, value: value, "grad", bucket_bytes=1)))
        expert.grad = None
    assert torch.equal(names.safe_get_full_fp32_param(dense), torch.full((5,), 2.0))
    assert torch.equal(names.safe_get_full_fp32_param(expert), mine + 1)
    del whole, part
    return found


def test_several_groups_agree_all_the_same() -> None:
    everybodys = run_ranks(_groups_with_values_of_their_own, 4, timeout=TIMEOUT)
    assert all(one == everybodys[0] for one in everybodys)
    kinds = [kind for kind, _ in everybodys[0]]
    assert kinds == ["RankMismatchError", "FragmentError", "FragmentError", "GradientUnavailableError"] * 4
    for bad_rank in range(4):
        assert everybodys[0][bad_rank * 4 + 1][1] == f"rank {bad_rank}: ZeroDivisionError: no"

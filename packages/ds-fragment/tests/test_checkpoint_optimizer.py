"""Optimizer state of every kind, saved and loaded: against the optimizer's own, and a run that never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_fragment import FlatPartition, attach, load_full, safe_get_full_optimizer_state, save_full
from ds_fragment.checkpoint.files import Reader
from ds_fragment.checkpoint.optimizer import OptimizerLoad, OptimizerState
from ds_fragment.errors import StateKeyError, UnlinkedParameterError
from fragment_oracle import raised
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Averaging(torch.optim.Optimizer):
    """Counts steps in its parameter groups, as apex's and DeepSpeed's FusedAdam do, or beside each parameter."""

    def __init__(self, params: Any, lr: float, by_group: bool) -> None:
        super().__init__(params, {"lr": lr})
        self._by_group = by_group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self._by_group:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    average = state.setdefault("exp_avg", torch.zeros_like(param))
                    if not self._by_group:
                        state["step"] = state.get("step", torch.tensor(0.0)) + 1
                    average.lerp_(param.grad, 0.1)
                    param.sub_(average * (group["lr"] / float(group["step"] if self._by_group else state["step"])))


KINDS: dict[str, Make] = {
    "steps of groups": lambda groups: Averaging(groups, lr=0.1, by_group=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True, weight_decay=0.1, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "tensor lr": lambda groups: torch.optim.AdamW(
        groups, lr=torch.tensor(0.1), betas=(torch.tensor(0.8), torch.tensor(0.9))
    ),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.5),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, centered=True, momentum=0.5),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.1),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.1),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.1),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.1),
}


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        self.unused = nn.Parameter(torch.randn(4))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))).square().mean()


def _groups(model: nn.Module, lr: float | None = None) -> list[dict[str, Any]]:
    params = list(model.parameters())
    rest = {} if lr is None else {"lr": lr}
    return [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() < 2], **rest}]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


def _whole(state: OptimizerState) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def put(position: int, tensor: torch.Tensor) -> None:
        entry = state.entries[position]
        assert tensor.shape == entry.shape
        found[entry.name] = tensor.to(entry.dtype, copy=True)

    failure = state.stream(put)
    if failure is not None:
        raise failure
    assert list(found) == [entry.name for entry in state.entries]
    keys = [name.rpartition("/")[2] for name in found]
    assert keys == sorted(keys), "one key after the other"
    return found


def _save(model: nn.Module, optimizer: Any, path: Path) -> OptimizerState:
    state = OptimizerState(dict(model.named_parameters()), optimizer)
    save_file(_whole(state), path, {"param_groups": json.dumps(state.param_groups)})
    return state


def _problems(model: nn.Module, optimizer: Any, path: Path, *, strict: bool = True) -> list[str]:
    params = dict(model.named_parameters())
    with Reader(path) as reader, OptimizerLoad(params, optimizer, reader, strict=strict) as load:
        if not load.problems:
            assert sum(load.write()) == load.total
        return load.problems


def _bits(thing: Any) -> Any:
    """What is equal only if all bits are."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype, thing.shape, bytes(thing.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(thing, dict):
        return {key: _bits(value) for key, value in thing.items() if key != "params"}
    if isinstance(thing, list | tuple):
        return [_bits(each) for each in thing]
    return thing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "stepped"])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, kind: str, before: int) -> None:
    path = tmp_path / "o.safetensors"
    model = Net(0)
    optimizer = KINDS[kind](_groups(model, 0.05))
    _train(model, optimizer, range(2))
    _save(model, optimizer, path)
    other = Net(1)
    resumed = KINDS[kind](_groups(other, 0.07))
    resumed.param_groups[0]["lr"] *= 3
    _train(other, resumed, range(10, 10 + before))
    other.load_state_dict(model.state_dict())
    assert not _problems(other, resumed, path)
    for _ in range(2):
        assert _bits(resumed.param_groups) == _bits(optimizer.param_groups)
        names = dict(zip(model.parameters(), other.parameters(), strict=True))
        assert {n for n, s in optimizer.state.items() if s} == {p for p, q in names.items() if resumed.state.get(q)}
        for param, twin in names.items():
            assert _bits(optimizer.state.get(param)) == _bits(resumed.state.get(twin))
        _train(model, optimizer, range(2, 4))
        _train(other, resumed, range(2, 4))
    assert _bits(dict(model.state_dict())) == _bits(dict(other.state_dict()))


def test_a_learning_rate_that_groups_share_as_one_tensor_is_theirs_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    model = Net(0)
    _save(model, torch.optim.AdamW(_groups(model, 0.05), lr=0.1), path)
    optimizer = KINDS["tensor lr"](_groups(model))
    kept = optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[1]["lr"] is kept
    assert not _problems(model, optimizer, path)
    assert [group["lr"].item() for group in optimizer.param_groups] == [torch.tensor(lr).item() for lr in (0.1, 0.05)]
    assert kept.item() == torch.tensor(0.1).item(), "it was not written"
    alone = torch.optim.AdamW(model.parameters(), lr=torch.tensor(7.0))
    kept = alone.param_groups[0]["lr"]
    _save(model, torch.optim.AdamW(model.parameters(), lr=0.05), path)
    assert not _problems(model, alone, path)
    assert alone.param_groups[0]["lr"] is kept, "compiled steps refer to it"
    assert kept.item() == torch.tensor(0.05).item()


def test_making_state_changes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    model = Net(0)
    optimizer = torch.optim.AdamW(_groups(model), lr=0.1)
    _train(model, optimizer, range(2))
    _save(model, optimizer, path)
    other = Net(1)
    fresh = torch.optim.AdamW(_groups(other), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(fresh, lambda _: 1.0)
    calls: list[int] = []
    fresh.register_step_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        other.a.weight[0, :] = -0.0
        other.a.weight[1, 0] = float("nan")
    other.a.bias.grad = torch.ones(5)
    before, grads = _bits(dict(other.state_dict())), [param.grad for param in other.parameters()]
    state, steps = torch.get_rng_state(), dict(vars(schedule))
    assert not _problems(other, fresh, path)
    assert _bits(dict(other.state_dict())) == before
    assert all(param.grad is grad for param, grad in zip(other.parameters(), grads, strict=True))
    assert bool((other.a.bias.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(vars(schedule)) == steps
    assert not calls
    assert not getattr(fresh, "_opt_called", False), "a schedule would take it for a step"


def test_before_the_first_step_there_are_groups_only(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    model = Net(0)
    state = _save(model, torch.optim.AdamW(_groups(model, 0.02), lr=0.1), path)
    assert not state.entries
    groups = {tuple(group["params"]): group["lr"] for group in state.param_groups}
    assert groups == {("a.weight", "b.weight"): 0.1, ("unused", "frozen", "a.bias", "b.bias"): 0.02}
    optimizer = torch.optim.AdamW(_groups(model), lr=0.5)
    _train(model, optimizer, range(2))
    assert not _problems(model, optimizer, path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert not any(optimizer.state.values()), "as before its first step"


def _as_before(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, **options: Any) -> str:
    before = _bits((optimizer.param_groups, [optimizer.state.get(param) for param in model.parameters()]))
    (problem,) = _problems(model, optimizer, path, **options)
    assert _bits((optimizer.param_groups, [optimizer.state.get(p) for p in model.parameters()])) == before
    return problem


def test_what_does_not_fit_is_told_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    model = Net(0)
    momentum = torch.optim.SGD(_groups(model, 0.05), lr=0.1, momentum=0.9)
    _train(model, momentum, range(1))
    _save(model, momentum, path)
    with pytest.warns(UserWarning, match="state is SGD's, and the optimizer here is AdamW"):
        told = _as_before(model, torch.optim.AdamW(_groups(model)), path)
    assert told.startswith("AdamW keeps ['exp_avg', 'exp_avg_sq', 'step'] of 'a.weight', ")
    assert "the file has ['momentum_buffer']: load into the kind of optimizer that saved it" in told
    told = _as_before(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), path)
    assert "in 2 of the file, with different lr: put them into groups of their own" in told
    other = torch.optim.SGD([model.a.weight, model.b.weight], lr=0.1, momentum=0.9)
    told = _as_before(model, other, path)
    assert told == "the file has optimizer state of 'a.bias', 'b.bias', which no optimizer updates here"
    assert not _problems(model, other, path, strict=False)
    assert other.state[model.a.weight]["momentum_buffer"].equal(momentum.state[model.a.weight]["momentum_buffer"])
    _save(model, torch.optim.SGD([model.a.weight], lr=0.1), path)
    told = _as_before(model, torch.optim.SGD(model.parameters(), lr=0.1), path)
    assert told.startswith("no parameter group of the file has 'unused', 'a.bias', 'b.weight' and 1 more")
    _save(model, torch.optim.SGD(model.parameters(), lr=0.1), path)
    told = _as_before(model, torch.optim.AdamW(model.parameters()), path)
    assert told.startswith("the file is of the optimizer SGD, whose groups have no amsgrad, betas")


def test_what_cannot_be_saved_is_an_error(tmp_path: Path) -> None:
    model = Net(0)
    optimizer = torch.optim.AdamW(_groups(model))
    _train(model, optimizer, range(1))
    named = dict(model.named_parameters())
    optimizer.state[model.b.bias]["note"] = "blocks of 256"
    with pytest.raises(StateKeyError, match=r"optim_state_key 'note' of .* is a str"):
        OptimizerState(named, optimizer)
    del optimizer.state[model.b.bias]["note"]
    optimizer.param_groups[0]["by"] = len
    with pytest.warns(UserWarning, match="hyperparameters by are left out"):
        state = OptimizerState(named, optimizer)
    assert "by" not in state.param_groups[0]
    with pytest.raises(UnlinkedParameterError, match="no optimizer updates any of the 2 parameters"):
        OptimizerState(dict(nn.Linear(2, 2).named_parameters()), True)


def _across(rank: int, folder: str) -> None:
    """Steps that are counted in groups, into an optimizer that counts them beside each parameter, and back."""
    path = Path(folder, "m.safetensors")
    for by_group in (True, False):
        run = _flat(0, 2, lambda groups, by=by_group: Averaging(groups, 0.1, by))  # type: ignore[misc]
        _train_flat(*run, range(3))
        save_full(run[0], path, optimizer=True)
        later = _train_flat(*run, range(3, 5))
        other = _flat(1, 2, lambda groups, by=not by_group: Averaging(groups, 0.1, by))  # type: ignore[misc]
        load_full(other[0], path, optimizer=True)
        for found, expected in zip(_train_flat(*other, range(3, 5)), later, strict=True):
            assert torch.equal(found, expected)
        with Reader(path) as reader, Reader(path.with_name(reader.metadata["optimizer"])) as beside:
            assert float(beside.tensor("b.weight/step")) == 3.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_of_groups_and_of_parameters(tmp_path: Path, ranks: int) -> None:
    run_ranks(_across, ranks, str(tmp_path))


def test_one_count_for_parameters_with_several(tmp_path: Path) -> None:
    path, model = tmp_path / "o.safetensors", Net(0)
    optimizer = Averaging(_groups(model), 0.1, by_group=False)
    _train(model, optimizer, range(2))
    optimizer.state[model.b.weight]["step"] += 5
    _save(model, optimizer, path)
    other = Net(1)
    found = _problems(other, Averaging(_groups(other), 0.1, by_group=True), path)
    assert "counts the steps of a parameter group, and the file has 2 of 'a.weight' and 7 of 'b.weight'" in found[0]


class _Counting(torch.optim.SGD):
    """Keeps a Python number, and a half-precision average."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["step"] = state.get("step", 0) + 1
                    average = state.setdefault("average", torch.zeros_like(param, dtype=torch.bfloat16))
                    average.add_(param.detach(), alpha=state["step"])


def _flat(seed: int, groups: int, make: Make) -> tuple[Net, list[FlatPartition], torch.optim.Optimizer]:
    model = Net(seed)
    params = [model.a.weight, model.b.weight], [model.a.bias, model.b.bias, model.unused]
    chosen = params if groups == 2 else ([*params[0], *params[1]],)
    partitions = [FlatPartition(each, index=index) for index, each in enumerate(chosen)]
    optimizer = make([{"params": [each.hp_param]} for each in partitions])
    attach(model, optimizer)
    return model, partitions, optimizer


def _train_flat(
    model: Net, partitions: list[FlatPartition], optimizer: torch.optim.Optimizer, steps: range
) -> list[torch.Tensor]:
    for step in steps:
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).backward()
        for partition in partitions:
            partition.reduce_gradients()
        optimizer.step()
        for partition in partitions:
            partition.publish()
    return [partition.hp_param.detach().clone() for partition in partitions]


def _python_numbers(rank: int, folder: str) -> None:
    make = lambda groups: _Counting(groups, lr=0.1, momentum=0.9)  # noqa: E731
    run = _flat(0, 2, make)
    _train_flat(*run, range(2))
    path = Path(folder, "m.safetensors")
    save_full(run[0], path, optimizer=True)
    later = _train_flat(*run, range(2, 4))
    other = _flat(1, 2, make)
    load_full(other[0], path, optimizer=other[2])
    for partition in other[1]:
        state = other[2].state[partition.hp_param]
        assert type(state["step"]) is int
        assert state["step"] == 2
        assert state["average"].dtype == torch.bfloat16
    for found, expected in zip(_train_flat(*other, range(2, 4)), later, strict=True):
        assert torch.equal(found, expected)
    with Reader(path) as reader, Reader(path.with_name(reader.metadata["optimizer"])) as beside:
        assert beside.dtypes["a.weight/step"] == torch.float32
        assert beside.shapes["a.weight/average"] == (5, 3)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_numbers_of_python_and_flat_tensors(tmp_path: Path, ranks: int) -> None:
    run_ranks(_python_numbers, ranks, str(tmp_path))


def _one_for_all(rank: int, folder: str) -> list[Any]:
    """One step in a flat tensor, several in the file."""
    path = Path(folder, "m.safetensors")
    model = Net(0)
    optimizer = torch.optim.AdamW(model.parameters())
    _train(model, optimizer, range(2))
    save_full(model, path, optimizer=optimizer)
    run = _flat(1, 1, torch.optim.AdamW)
    load_full(run[0], path, optimizer=True)
    state = run[2].state[run[1][0].hp_param]
    assert state["step"].item() == 2
    for param in model.parameters():
        assert (param in optimizer.state) == (param is not model.unused and param.requires_grad)
    unused = safe_get_full_optimizer_state(run[0].unused, "exp_avg")
    assert unused is not None
    assert not unused.any(), "as if it had been flat from the start"
    assert torch.equal(
        safe_get_full_optimizer_state(run[0].a.weight, "exp_avg"), optimizer.state[model.a.weight]["exp_avg"]
    )
    for param in (model.b.weight, model.b.bias):
        optimizer.state[param]["step"] += 5
    save_full(model, path, optimizer=optimizer)
    before = _bits(state)
    values = [partition.hp_param.detach().clone() for partition in run[1]]
    told = [raised(lambda: load_full(run[0], path, optimizer=True))]
    two = _flat(1, 2, torch.optim.AdamW)
    two[0].a.weight.requires_grad_(True)
    told.append(raised(lambda: load_full(two[0], path, optimizer=True)))
    assert _bits(state) == before
    assert all(torch.equal(one.hp_param, value) for one, value in zip(run[1], values, strict=True))
    assert not any(two[2].state.values()), "as before its first step"
    return told


def test_parameters_of_a_flat_tensor_have_one_step(tmp_path: Path) -> None:
    told = run_ranks(_one_for_all, 2, str(tmp_path))
    assert told[0] == told[1]
    (kind, one), (_, two) = told[0]
    assert kind == "InvalidValueError"
    assert "share one 'step' here, and the file has 2 and 7" in one
    assert "'a.weight' and 'b.weight' share one 'step' here" in two


def _all_in_one_error(rank: int, folder: str) -> list[Any]:
    path = Path(folder, "m.safetensors")
    model = Net(0)
    optimizer = torch.optim.AdamW(_groups(model, 0.05))
    _train(model, optimizer, range(1))
    save_full(model, path)
    told = [raised(lambda: load_full(model, path, optimizer=optimizer))]
    save_full(model, path, optimizer=optimizer)
    model.a, model.extra = nn.Linear(3, 4), nn.Parameter(torch.randn(3))
    one = torch.optim.AdamW(model.parameters())
    told.append(raised(lambda: load_full(model, path, optimizer=one)))
    assert not any(one.state.values())
    told.append(raised(lambda: save_full(Net(0), path, optimizer=[])))
    if rank == 1:
        one.param_groups[0]["lr"] = 7.0
    told.append(raised(lambda: save_full(model, path, optimizer=one)))
    one.param_groups[0]["lr"] = 0.1
    _train(model, one, range(0))
    one.state[model.b.bias]["step"] = torch.tensor(float(rank))
    told.append(raised(lambda: save_full(model, path, optimizer=one)))
    assert sorted(each.suffix for each in Path(folder).iterdir()) == [".optimizer", ".safetensors"]
    return told


def test_what_is_wrong_is_one_error_on_every_rank(tmp_path: Path) -> None:
    told = run_ranks(_all_in_one_error, 2, str(tmp_path))
    assert told[0] == told[1]
    (_, absent), (_, misfit), (_, empty), (kind, groups), (_, differs) = told[0]
    assert "has no optimizer state: save it with save_full(..., optimizer=True)" in absent
    assert "missing 1 (extra)" in misfit
    assert "'a.weight' has shape (5, 3) in the file and (4, 3) in the model" in misfit
    assert "no parameter group of the file has 'extra'" in misfit
    assert "with different lr" in misfit
    assert "optimizer is empty" in empty
    assert kind == "RankMismatchError"
    assert "parameter group 0 differs over the ranks" in groups
    assert "'b.bias/step', which every rank holds whole, differs over the ranks" in differs


def _stages(rank: int, folder: str) -> None:
    """Each rank has a stage of its own, as in a pipeline."""
    path = Path(folder, "m.safetensors")

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({f"stage{rank}": nn.Linear(2 + rank, 3)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.1 + rank)

    model, optimizer = build(rank)
    for _ in range(2):
        model[f"stage{rank}"](torch.ones(1, 2 + rank)).square().sum().backward()
        optimizer.step()
    save_full(model, path, optimizer=optimizer)
    other, resumed = build(7)
    load_full(other, path, optimizer=resumed, strict=False)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin)
        assert _bits(optimizer.state[param]) == _bits(resumed.state[twin])
    assert resumed.param_groups[0]["lr"] == 0.1 + rank


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    run_ranks(_stages, 3, str(tmp_path))


class _Refusing(_Counting):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("only with a closure")


def test_state_of_another_dtype_and_state_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    model = Net(0)
    optimizer = _Counting(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, range(2))
    _save(model, optimizer, path)
    (problem,) = _problems(Net(1), _Refusing(Net(1).parameters(), lr=0.1), path)
    assert "no optimizer updates any" in problem
    other = Net(1)
    with pytest.warns(UserWarning, match="state is _Counting's, and the optimizer here is _Refusing"):
        (problem,) = _problems(other, _Refusing(other.parameters(), lr=0.1), path)
    assert problem == "_Refusing could not make its state of 'a.weight': RuntimeError: only with a closure"
    resumed = _Counting(other.parameters(), lr=0.1, momentum=0.9)
    _train(other, resumed, range(1))
    momenta = [state["momentum_buffer"] for state in resumed.state.values()]
    for state in resumed.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    with pytest.warns(UserWarning, match="fewer digits here than in the file; rounded: 'a.weight/momentum_buffer'"):
        assert not _problems(other, resumed, path)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        if optimizer.state.get(param):
            expected = optimizer.state[param]["momentum_buffer"].bfloat16()
            assert torch.equal(resumed.state[twin]["momentum_buffer"], expected)
    for state, momentum in zip(resumed.state.values(), momenta, strict=True):
        state["momentum_buffer"] = momentum.half()
    problems = _problems(other, resumed, path)
    assert "is torch.float32 in the file and torch.float16 here, which may not hold its values" in problems[0]

"""Mixtures of experts whose ranks route differently train under DeepSpeed ZeRO-3 and FSDP2 as one process would.

[Note: one start an engine] Starting ranks and importing libraries takes longer than all the training, so that one start
trains every model. Each result is a file; a model that raises or hangs leaves none and is named.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from mixtures import CASES, Case, loss_of

WORLD_SIZE, STEPS, LEARNING_RATE = 2, 3, 0.2
CASE_TIMEOUT = 60.0  # seconds; DeepSpeed's first start compiles its communication operator before the first case
ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}  # for DeepSpeed
ENGINES = {"fsdp2": "torch", "zero3": "deepspeed"}
# What DeepSpeed says without `adapt_calls`: see the note there.
# DeepSpeed 0.16 refuses such a leaf, 0.19 frees its parameters too early.
_FAULT = "cannot be set as a leaf module when it does not have any input tensors|size of tensor"
FAULTS = {"list, frozen input": _FAULT, "jetmoe": _FAULT}

Result = dict[str, Any]


def leaves_of(case: Case, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that the case names."""
    return [model.get_submodule(name) for name in case.leaves]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Momentum tells a zero gradient from none, and nothing makes rounding errors larger, as Adam does."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, momentum=0.9)


def train_alone(case: Case) -> Result:
    """One process, plain PyTorch: the mean of all ranks' losses, zeros for what nobody used."""
    model = case.make()
    optimizer = sgd(model)
    losses: list[list[float]] = [[] for _ in range(WORLD_SIZE)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD_SIZE):
            loss = loss_of(model(**case.batch(rank, step)))
            losses[rank].append(loss.item())
            (loss / WORLD_SIZE).backward()
        for param in model.parameters():
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        optimizer.step()
    return {"losses": losses, "values": {name: param.detach() for name, param in model.named_parameters()}}


def train_zero3(case: Case, rank: int, adapt: bool = True) -> Result:
    import deepspeed
    import ds_z3leaf
    from ds_z3leaf._calls import restore_calls

    model = case.make()
    for leaf in ds_z3leaf.mark_leaves(model, modules=leaves_of(case, model)):
        if not adapt:
            restore_calls(leaf)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=sgd(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 otherwise
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine(**case.batch(rank, step)))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    values = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            values[name] = param.detach().clone()
    engine.destroy()
    return {"losses": losses, "values": values}


def train_fsdp2(case: Case, rank: int) -> Result:
    from ds_z3leaf import fully_shard_leaves
    from torch.distributed.fsdp import fully_shard

    model = case.make()
    fully_shard_leaves(model, leaves_of(case, model))
    for module in model.modules():
        if type(module).__name__ == case.layers:
            fully_shard(module)
    fully_shard(model)
    optimizer = sgd(model)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model(**case.batch(rank, step)))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return {"losses": losses, "values": {name: param.full_tensor() for name, param in model.named_parameters()}}


def train_cases(rank: int, engine: str, names: list[str], folder: str) -> None:
    """Train every model and leave its result in a file. A model that takes too long ends this process."""
    train = {"fsdp2": train_fsdp2, "zero3": train_zero3}[engine]
    for name in names:
        progress = open(Path(folder, f"{name}.{rank}.stack"), "w")  # noqa: SIM115

        def give_up(file: Any = progress) -> None:
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
            os._exit(1)

        timer = threading.Timer(CASE_TIMEOUT, give_up)
        timer.start()
        result = train(CASES[name], rank)
        timer.cancel()
        torch.save(result, Path(folder, f"{name}.{rank}.pt"))
        progress.close()


@functools.cache
def start(engine: str) -> tuple[Path, str]:
    """Train all models under an engine: the folder of their results, and what went wrong."""
    names = [name for name, case in CASES.items() if not case.missing]
    folder = Path(tempfile.mkdtemp(prefix=f"z3leaf-{engine}-"))
    try:
        run_ranks(train_cases, WORLD_SIZE, engine, names, str(folder), timeout=280.0, env=ENV)
    except RankError as error:
        return folder, str(error)
    return folder, ""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_it_trains_as_one_process_would(engine: str, name: str) -> None:
    case = CASES[name]
    missing = [library for library in (ENGINES[engine], *case.needs) if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    folder, problem = start(engine)
    for rank in range(WORLD_SIZE):
        file = folder / f"{name}.{rank}.pt"
        if not file.exists():
            stack = folder / f"{name}.{rank}.stack"
            pytest.fail(
                f"{name!r} did not end\n{stack.read_text()}{problem}" if stack.exists() else f"not reached\n{problem}"
            )
        found, expected = torch.load(file), train_alone(case)
        torch.testing.assert_close(found["losses"], expected["losses"][rank], rtol=1e-4, atol=1e-5)
        assert found["values"].keys() == expected["values"].keys()
        for key, value in expected["values"].items():
            torch.testing.assert_close(
                found["values"][key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def train_as_it_is(rank: int, name: str) -> None:
    train_zero3(CASES[name], rank, adapt=False)


@pytest.mark.parametrize("name", FAULTS)
def test_zero_3_cannot_train_a_leaf_without_an_input_that_has_a_gradient(name: str) -> None:
    """The reason for `adapt_calls`."""
    missing = [library for library in ("deepspeed", *CASES[name].needs) if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    with pytest.raises(RankError, match=FAULTS[name]):
        run_ranks(train_as_it_is, WORLD_SIZE, name, timeout=120.0, env=ENV)

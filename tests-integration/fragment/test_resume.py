"""Values, optimizer state, ``step`` and parameter groups saved from every engine, and the run resumed in every other.

``python tests-integration/fragment/test_resume.py --write docs/resume.md`` writes the table of the pairs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import FlatPartition, iter_full, load_full, save_full
from ds_fragment.checkpoint.optimizer import OptimizerState
from ds_fragment.engines.model import own_parameters
from ds_fragment.testing import Training, net
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).parent))
import conformance_engines as engines

_HEAD = """# Resuming in another engine

A run is trained for two steps, saved with `save_full(model, path, optimizer=True)`, and goes on for two steps more. A
run in another engine, with other weights and learning rates, loads the file with
`load_full(model, path, optimizer=True)` and trains the same two steps; all ranks together see the same data. Half of
these runs are fresh, and half have made a step before they load.

After loading, all values, the optimizer state, `step` and the parameter groups have the file's bits. After the two
steps the values and the state are those of the run that was saved: bit for bit, or as close as the table says,
relative to the largest element of a tensor. Where they are not bit-equal the two engines compute differently: they sum
gradients in another order, or round them elsewhere. So may DDP itself on four ranks, which makes its buckets anew after
its first step.

AdamW has a group with decay and one without, of different learning rates; SGD has momentum and dampening. The page is
made by `python tests-integration/fragment/test_resume.py --write docs/resume.md` (gloo, CPU). In the tables `=` is
bit-equal.
"""
PAGE = Path(__file__).parents[2] / "docs" / "resume.md"
ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9, dampening=0.25),
}

Make = Callable[[Any, Callable[..., torch.optim.Optimizer], float], Training]


@dataclass(frozen=True)
class Engine:
    """How a training is made of a model, an optimizer's class, and what learning rates are multiplied by."""

    make: Make
    ranks: int
    dtype: torch.dtype = torch.float32


def _groups(params: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Weights with decay, the rest without and slower."""
    decayed = [param for name, param in params.items() if name.endswith("weight")]
    rest = [param for name, param in params.items() if not name.endswith("weight")]
    return [
        {"params": decayed, "lr": 0.05 * scale, "weight_decay": 0.1 * scale},
        {"params": rest, "lr": 0.02 * scale, "weight_decay": 0.0},
    ]


def _trained(model: torch.nn.Module) -> dict[str, Any]:
    return {name: param for name, param in own_parameters(model) if param.requires_grad}


def _optimized(model: Any, optimizer: Any, scale: float) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = optimizer(_groups(_trained(model), scale))
    return made


def _plain(model: Any, optimizer: Any, scale: float) -> Training:
    return Training(model, _optimized(model, optimizer, scale))


def _ddp(model: Any, optimizer: Any, scale: float) -> Training:
    model = torch.nn.parallel.DistributedDataParallel(model)
    return engines._Ddp(model, _optimized(model, optimizer, scale), **engines._place())


def _zero_redundancy(model: Any, optimizer: Any, scale: float) -> Training:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = torch.nn.parallel.DistributedDataParallel(model)
    made = ZeroRedundancyOptimizer(_groups(_trained(model), scale), optimizer_class=optimizer, lr=1.0)
    return engines._Ddp(model, made, **engines._place())


class _Flat(Training):
    """A flat partition for each parameter group."""

    def __init__(self, model: Any, optimizer: Any, scale: float) -> None:
        groups = _groups(_trained(model), scale)
        self._partitions = [FlatPartition(group["params"], index=index) for index, group in enumerate(groups)]
        for group, partition in zip(groups, self._partitions, strict=True):
            group["params"] = [partition.hp_param]
        super().__init__(model, optimizer(groups), **engines._place(), dtype=next(model.parameters()).dtype)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        for partition in self._partitions:
            partition.reduce_gradients()

    def step(self) -> None:
        super().step()
        for partition in self._partitions:
            partition.publish()

    def close(self) -> None:
        for partition in self._partitions:
            partition.unlink()


def _fsdp1(model: Any, optimizer: Any, scale: float) -> Training:
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    warnings.simplefilter("ignore", FutureWarning)
    policy = ModuleWrapPolicy({torch.nn.Linear})
    model = FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    return engines._Fsdp1(model, _optimized(model, optimizer, scale), **engines._place())


def _fsdp2(model: Any, optimizer: Any, scale: float, **options: Any) -> Training:
    mesh = engines._mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shards",))
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh, **options)
    return engines._Fsdp2(model, _optimized(model, optimizer, scale), **engines._place())


class _TensorParallel(engines._Fsdp2):
    """Every parameter is a DTensor, and so are the outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: Any = super().forward(x)
        whole: torch.Tensor = outputs.full_tensor()
        return whole


def _fsdp2_tp(model: Any, optimizer: Any, scale: float) -> Training:
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = engines._mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=False)}
    parallelize_module(model, mesh["tp"], plan)
    for name in ("gain", "unused"):
        param = getattr(model, name)
        whole = torch.nn.Parameter(distribute_tensor(param, mesh["tp"]), requires_grad=param.requires_grad)
        setattr(model, name, whole)
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["fsdp"])
    made = _optimized(model, optimizer, scale)
    return _TensorParallel(model, made, data_index=dist.get_rank() // 2, data_ranks=2)


def _hybrid(model: Any, optimizer: Any, scale: float) -> Training:
    mesh = engines._mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh)
    return engines._Fsdp2(model, _optimized(model, optimizer, scale), **engines._place())


def _deepspeed(stage: str, dtype: str, model: Any, optimizer: Any, scale: float, **options: Any) -> Training:
    import deepspeed

    sys.path.insert(0, str(Path(__file__).parents[1] / "deepspeed"))
    from engines import Case, configuration  # type: ignore[attr-defined]

    case = Case(stage, dtype, **options)
    made = _optimized(model, optimizer, scale)
    engine = deepspeed.initialize(model=model, optimizer=made, config=configuration(case), dist_init_required=False)[0]
    return engines._DeepSpeed(engine, None, **engines._place(), dtype=case.lp)


_BF16_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_zero = {stage: functools.partial(_deepspeed, stage, "fp32") for stage in ("zero1", "zero2", "zero3")}
_bf16 = {stage: functools.partial(_deepspeed, stage, "bf16") for stage in ("none", "zero2", "zero3", "bf16opt")}
ENGINES = {
    "plain": Engine(_plain, 1),
    "DDP, 2 ranks": Engine(_ddp, 2),
    "DDP, 4 ranks": Engine(_ddp, 4),
    "ZeroRedundancyOptimizer, 2 ranks": Engine(_zero_redundancy, 2),
    "FlatPartition, 2 ranks": Engine(_Flat, 2),
    "FSDP1, 2 ranks": Engine(_fsdp1, 2),
    "FSDP2, 2 ranks": Engine(_fsdp2, 2),
    "FSDP2, 4 ranks": Engine(_fsdp2, 4),
    "FSDP2 x TP, 2 x 2 ranks": Engine(_fsdp2_tp, 4),
    "ZeRO-1, 2 ranks": Engine(_zero["zero1"], 2),
    "ZeRO-1, 4 ranks": Engine(_zero["zero1"], 4),
    "ZeRO-2, 2 ranks": Engine(_zero["zero2"], 2),
    "ZeRO-3, 2 ranks": Engine(_zero["zero3"], 2),
    "ZeRO-3, 4 ranks": Engine(_zero["zero3"], 4),
    "FlatPartition bf16, 2 ranks": Engine(_Flat, 2, torch.bfloat16),
    "FSDP2 bf16, 2 ranks": Engine(functools.partial(_fsdp2, mp_policy=_BF16_POLICY), 2, torch.bfloat16),
    "ZeRO-2 bf16, 2 ranks": Engine(_bf16["zero2"], 2, torch.bfloat16),
    "ZeRO-3 bf16, 2 ranks": Engine(_bf16["zero3"], 2, torch.bfloat16),
    "BF16_Optimizer, 2 ranks": Engine(_bf16["bf16opt"], 2, torch.bfloat16),
}
FURTHER = {  # each with one of the above
    "FSDP2 hybrid, 2 x 2 ranks": (Engine(_hybrid, 4), "FSDP2, 2 ranks"),
    "DeepSpeed bf16 without ZeRO, 2 ranks": (Engine(_bf16["none"], 2, torch.bfloat16), "ZeRO-2 bf16, 2 ranks"),
    **{
        f"{name} bf16 offload, 2 ranks": (
            Engine(functools.partial(_bf16[stage], offload=True), 2, torch.bfloat16),
            f"{name} bf16, 2 ranks",
        )
        for name, stage in (("ZeRO-2", "zero2"), ("ZeRO-3", "zero3"))
    },
}
_MAIN = list(ENGINES)
ENGINES.update((name, engine) for name, (engine, _) in FURTHER.items())
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of a value, relative to the largest of its tensor

Pair = tuple[str, str, str]  # optimizer, from, to
_AROUND = (
    "plain",
    "FlatPartition, 2 ranks",
    "FSDP1, 2 ranks",
    "FSDP2 x TP, 2 x 2 ranks",
    "ZeRO-1, 2 ranks",
    "ZeRO-3, 2 ranks",
    "plain",
)
PAIRS: list[Pair] = [
    *(("AdamW", a, b) for a in _MAIN for b in _MAIN if ENGINES[a].dtype == ENGINES[b].dtype),
    *(("AdamW", *pair) for a, (_, b) in FURTHER.items() for pair in ((a, a), (a, b), (b, a))),
    *(("SGD", a, b) for a, b in pairwise(_AROUND)),
]


def same_arithmetic(source: str, name: str) -> bool:
    """Whether two engines compute the same, bit for bit: the sum of two ranks' gradients has one order only.

    On four ranks gloo sums a gradient in an order that depends on its place in the bucket, and DDP makes its buckets
    anew after the first step.
    """
    two = [ENGINES[each].ranks == 2 and ENGINES[each].dtype == torch.float32 for each in (source, name)]
    return (source == name != "DDP, 4 ranks") or all(two)


_HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def _can_run(pair: Pair) -> bool:
    makes = [getattr(ENGINES[name].make, "func", None) for name in pair[1:]]
    return _HAS_DEEPSPEED or _deepspeed not in makes


# What the ranks do.


def _training(name: str, optimizer: str, seed: int, scale: float) -> Training:
    model = net(seed)
    model.unused.requires_grad_(False)
    engine = ENGINES[name]
    if engine.make is _Flat:
        model.to(engine.dtype)
    training = engine.make(model, OPTIMIZERS[optimizer], scale)
    training.attach()
    return training


def _train(training: Training, steps: range) -> None:
    for step in steps:
        everybodys = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        mine = everybodys.chunk(training.data_ranks)[training.data_index]
        training.zero_grad()
        training.backward(training.forward(mine).float().square().mean())
        training.step()


def _everything(training: Training) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """All values and all state, whole and on every rank, and the parameter groups."""
    found = {name: tensor.float() for name, tensor in iter_full(training.model)}
    state = OptimizerState(dict(own_parameters(training.model)), True)

    def put(position: int, tensor: torch.Tensor) -> None:
        entry = state.entries[position]
        found[entry.name] = tensor.to(entry.dtype, copy=True)

    assert state.stream(put) is None
    return found, state.param_groups


def _save(rank: int, jobs: list[tuple[str, str]], folder: str) -> None:
    if _HAS_DEEPSPEED:
        engines._prepare()
    for optimizer, name in jobs:
        training = _training(name, optimizer, seed=0, scale=1.0)
        _train(training, range(2))
        path = _path(folder, optimizer, name)
        save_full(training.model, path, optimizer=True)
        _train(training, range(2, 4))
        held, _ = _everything(training)
        if rank == 0:
            torch.save(held, path.with_suffix(".later"))
        training.close()


def _load(rank: int, jobs: list[Pair], folder: str) -> dict[Pair, str]:
    if _HAS_DEEPSPEED:
        engines._prepare()
    return {job: _resume(*job, folder) for job in jobs}


def _resume(optimizer: str, source: str, name: str, folder: str) -> str:
    path = _path(folder, optimizer, source)
    training = _training(name, optimizer, seed=1, scale=3.0)
    if list(ENGINES).index(source) % 2:  # whether its optimizer has state is another question for each engine
        _train(training, range(7, 8))
    load_full(training.model, path, optimizer=True)
    held, groups = _everything(training)
    with safe_open(path, "pt") as file:
        beside = path.with_name(file.metadata()["optimizer"])
    with safe_open(beside, "pt") as file:
        saved_groups = json.loads(file.metadata()["param_groups"])
    stored = {**load_file(path), **load_file(beside)}
    assert set(held) == set(stored)
    assert any("/" in key for key in stored)
    for key, tensor in stored.items():
        assert torch.equal(held[key].view(torch.int32), tensor.float().view(torch.int32)), key
    assert len(groups) == len(saved_groups)
    for group in groups:  # which may be in another order, as the names of a group may
        saved = next(each for each in saved_groups if set(each["params"]) == set(group["params"]))
        assert {**group, "params": 0} == {**saved, "params": 0}
    _train(training, range(2, 4))
    held, _ = _everything(training)
    training.close()
    return _difference(held, torch.load(path.with_suffix(".later")))


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    assert set(found) == set(expected)
    if all(torch.equal(found[key].view(torch.int32), expected[key].view(torch.int32)) for key in found):
        return "bit-equal"
    largest = 0.0
    for key, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-12)
        largest = max(largest, float((found[key] - tensor).abs().max()) / scale)
    return f"close {largest:.0e}"


def _path(folder: str, optimizer: str, name: str) -> Path:
    return Path(folder, f"{optimizer} {name}.safetensors".replace(" ", "_").replace(",", ""))


# The tests.


@functools.cache
def _outcomes() -> dict[Pair, str]:
    """What came of each pair: the engines of as many ranks share their processes."""
    found: dict[Pair, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            saved = [
                job
                for job in dict.fromkeys(pair[:2] for pair in filter(_can_run, PAIRS))
                if ENGINES[job[1]].ranks == ranks
            ]
            run_ranks(_save, ranks, saved, folder, env=ENV, timeout=280)
        for ranks in (1, 2, 4):
            loaded = [pair for pair in filter(_can_run, PAIRS) if ENGINES[pair[2]].ranks == ranks]
            everybodys = run_ranks(_load, ranks, loaded, folder, env=ENV, timeout=280)
            assert all(each == everybodys[0] for each in everybodys)
            found |= everybodys[0]
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", PAIRS, ids=" - ".join)
def test_a_run_goes_on_in_another_engine(pair: Pair) -> None:
    if not _can_run(pair):
        pytest.skip("needs DeepSpeed")
    _, source, name = pair
    outcome = _outcomes()[pair]
    if outcome != "bit-equal":
        assert not same_arithmetic(source, name), outcome
        assert float(outcome.removeprefix("close ")) < TOLERANCE[ENGINES[name].dtype], outcome


def _page(outcomes: dict[Pair, str]) -> str:
    parts, rest = [_HEAD], dict(outcomes)
    for title, dtype in (("In fp32", torch.float32), ("In bf16, with fp32 masters", torch.bfloat16)):
        names = [name for name in _MAIN if ENGINES[name].dtype == dtype]
        parts.append(f"## {title}\n\nAdamW; from the engine of a row to the engine of a column.\n")
        parts.append(
            _line("", "from", *(f"{at}" for at in range(1, len(names) + 1))) + _line(*["---"] * (len(names) + 2))
        )
        for at, source in enumerate(names, 1):
            cells = [rest.pop(("AdamW", source, name)) for name in names]
            parts[-1] += _line(str(at), source, *cells)
    parts.append("## Others\n")
    parts.append(_line("from", "to", "optimizer", "") + _line(*["---"] * 4))
    parts[-1] += "".join(_line(source, name, kind, outcome) for (kind, source, name), outcome in rest.items())
    return "\n".join(parts)


def _line(*cells: str) -> str:
    return f"| {' | '.join(each.replace('bit-equal', '=').replace('close ', '') for each in cells)} |\n"


def test_the_page_lists_the_pairs() -> None:
    page = re.sub(r"(?<=\| )(=|\d+e-\d+)(?= \|)", "?", PAGE.read_text())
    assert page == _page(dict.fromkeys(PAIRS, "?"))


if __name__ == "__main__":
    assert sys.argv[1:-1] == ["--write"], "test_resume.py --write PAGE"
    found = _outcomes()
    Path(sys.argv[2]).write_text(_page({pair: found[pair] for pair in PAIRS}))

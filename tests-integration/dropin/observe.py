"""What a run leaves behind, as text that two runs can be compared by: digests of tensors, losses, groups."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

READ = {"fp32": "safe_get_full_fp32_param", "grad": "safe_get_full_grad", "exp_avg": "safe_get_full_optimizer_state"}
NOTHING = "None"  # what a reader answers that has no answer
RAISED = "raised "


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """The sha256 of the tensors' dtypes, shapes and bytes, in this order."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, on every rank; all must call it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def trained(engine: Any) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}


def read(engine: Any, what: str, scale: float = 1.0) -> dict[str, str]:
    """What DeepSpeed's own name for it answers, by parameter; all ranks must call it.

    Args:
        engine: the engine.
        what: a key of `READ`.
        scale: what the answer is divided by, a power of two.
    """
    import deepspeed

    reader = getattr(deepspeed.utils, READ[what])
    found = {}
    for name, param in trained(engine).items():
        try:
            answer = reader(param, "exp_avg") if what == "exp_avg" else reader(param)
            found[name] = NOTHING if answer is None else digest([answer.float() / scale])
        except Exception as error:
            found[name] = f"{RAISED}{type(error).__name__}: {error}"
            print(f"{READ[what]} of {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def weights(engine: Any) -> str:
    """The digest of the model's parameters, whole, in the dtype that it computes with; all ranks must call it."""
    import deepspeed

    found = []
    for _, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            found.append(digest([param]))
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:24]


def held(engine: Any) -> list[str]:
    """What each rank's torch optimizer holds, partitions and state, read without a utility; all ranks must call it."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors: list[torch.Tensor] = []
    for param, state in base.state.items():
        for value in (param, *(value for _, value in sorted(state.items()) if isinstance(value, torch.Tensor))):
            tensors += _without_padding(engine.optimizer, param, value)
    return of_all_ranks(f"{len(tensors)} {digest(tensors)}")


def _without_padding(optimizer: Any, flat: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """``value``, which is ``flat`` or of its shape, without what ZeRO-3 leaves as it finds it behind a parameter."""
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", [])
    index = next((index for index, other in enumerate(flats) if other is flat), None)
    if index is None or value.shape != flat.shape:
        return [value]
    found, start = [], 0
    for param in optimizer.fp16_groups[index]:
        size = param.partition_numel()
        rank = dist.get_rank(param.ds_process_group)
        found.append(value[start : start + max(0, min(size, param.ds_numel - rank * size))])
        start += size
    return found


def step(engine: Any) -> None:
    """An optimizer step. DeepSpeed before 0.19 gathers into views that torch 2.13 protects while autograd is on."""
    with torch.no_grad():
        engine.step()


def fit(
    engine: Any,
    loss_of: Callable[[int, int], torch.Tensor],
    *,
    steps: int = 3,
    start: int = 0,
    reads: Iterable[str] = READ,
    unscale: bool = False,
) -> dict[str, Any]:
    """Train, and say what came of it; all ranks must call it.

    Args:
        engine: the engine.
        loss_of: the loss of a micro batch, by step and micro batch.
        steps: optimizer steps.
        start: the first step's number.
        reads: which keys of `READ` are read, gradients before the last step and the others after it.
        unscale: whether the gradients that are read have the loss scale in them.
    """
    found: dict[str, Any] = {}
    losses = []
    for number in range(start, start + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(number, micro)
            losses.append(float(loss).hex())
            engine.backward(loss)
            if number == start + steps - 1 and engine.is_gradient_accumulation_boundary() and "grad" in reads:
                found["grad"] = read(engine, "grad", float(engine.optimizer.loss_scale) if unscale else 1.0)
            step(engine)
    found |= {"losses": of_all_ranks(losses), "weights": weights(engine), "held": held(engine)}
    return found | {what: read(engine, what) for what in reads if what != "grad"}


def group_ranks() -> dict[str, Any]:
    """The ranks of every group that DeepSpeed's module has on each rank; all ranks must call it."""
    from deepspeed.utils import groups

    found: dict[str, Any] = {}
    for name in ("_get_data_parallel_group", "_get_sequence_data_parallel_group", "_get_max_expert_parallel_group"):
        try:
            group = getattr(groups, name)()
        except Exception:
            group = None
        found[name] = NOTHING if group is None else dist.get_process_group_ranks(group)
    for name in ("_get_expert_parallel_group_dict", "_get_expert_data_parallel_group_dict"):
        known = sorted(getattr(groups, name)().items())
        found[name] = [[key, dist.get_process_group_ranks(group)] for key, group in known]
    for name in ("_get_model_parallel_world_size", "_get_sequence_parallel_world_size", "_get_broadcast_src_rank"):
        found[name] = getattr(groups, name)()
    return {name: of_all_ranks(value) for name, value in found.items()}


def classes_in(folder: Path) -> dict[str, list[str]]:
    """The classes and functions that the pickles of a checkpoint name, by file."""
    files = sorted(folder.rglob("*.pt"))
    return {file.name: sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) for file in files}


def is_leaf(module: nn.Module) -> bool:
    """Whether ZeRO-3 takes a module as one."""
    from deepspeed.utils import z3_leaf_module

    return bool(z3_leaf_module(module))

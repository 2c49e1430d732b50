"""The operations, each done with ds-fragment as a user would do it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

import ds_fragment
from ds_fragment import tensor_fragment
from ds_fragment.errors import FragmentError
from ds_fragment.testing._engine import Training
from ds_fragment.testing._lockstep import Unsupported
from ds_fragment.testing._net import ONE, STATE, USED, Net, local_pattern, pattern

Found = dict[str, torch.Tensor]


def what_of(quantity: str) -> str:
    """The quantity as ds-fragment calls it."""
    return STATE if quantity == "state" else quantity


def read_one(training: Training, quantity: str) -> Found:
    """``safe_get_full_*`` of one parameter after the other."""
    params, found = training.parameters(), {}
    for name in _names(quantity):
        whole = _full(params[name], quantity)
        if whole is not None:
            found[name] = whole
    return found


def _full(param: torch.Tensor, quantity: str) -> torch.Tensor | None:
    if quantity == "value":
        return tensor_fragment.safe_get_full_fp32_param(param)
    if quantity == "grad":
        return tensor_fragment.safe_get_full_grad(param)
    return tensor_fragment.safe_get_full_optimizer_state(param, STATE)


def read_many(training: Training, quantity: str) -> Found:
    """``iter_full`` of the model, without what is absent; of the parameters that have state."""
    if quantity == "state":  # a parameter that is trained and was never used is an error
        return read_again(training, quantity)
    named = ds_fragment.iter_full(training.model, what_of(quantity), missing="skip")
    return {str(name): tensor for name, tensor in named}


def read_again(training: Training, quantity: str) -> Found:
    """``iter_full`` of the parameters one by one, which leaves the modules as they are."""
    params = training.parameters()
    named = ds_fragment.iter_full([(name, params[name]) for name in _names(quantity)], what_of(quantity))
    return {str(name): tensor for name, tensor in named}


def _write_one(training: Training, quantity: str) -> Found:
    param, value = training.parameters()[ONE], pattern(ONE, _shapes()[ONE])
    if quantity == "value":
        tensor_fragment.safe_set_full_fp32_param(param, value)
    elif quantity == "grad":
        tensor_fragment.safe_set_full_grad(param, value)
    else:
        tensor_fragment.safe_set_full_optimizer_state(param, value, STATE)
    return {ONE: value}


def _write_many(training: Training, quantity: str) -> Found:
    params = training.parameters()
    values = {name: pattern(name, _shapes()[name]) for name in _names(quantity)}
    ds_fragment.set_many([(params[name], value) for name, value in values.items()], what_of(quantity))
    return values


def _write_local(training: Training, quantity: str) -> Found:
    """One rank writes something else into its piece, if no other rank holds the same; else all write one number."""
    param, what = training.parameters()[ONE], what_of(quantity)
    failure: FragmentError | None = None
    try:
        piece = ds_fragment.get_local(param, what)
    except FragmentError as error:  # this rank alone may say so: the others write, and all must be told
        failure, piece = error, torch.empty(0)
    numel = torch.tensor([piece.numel()], dtype=torch.int64)
    numels = _gathered(numel)
    apart = sum(numels) == _shapes()[ONE].numel() and len(numels) > 1
    writer = next((rank for rank, held in enumerate(numels) if held), 0)
    mine = local_pattern(piece) if apart else torch.full(piece.shape, 0.0625)
    if apart and dist.get_rank() != writer:
        mine = piece.detach().float().clone()
    ds_fragment.set_local(param, mine, what)
    if failure is not None:
        raise failure
    if not torch.equal(ds_fragment.get_local(param, what).float(), mine):
        raise AssertionError("get_local does not give what set_local wrote")
    if not apart:
        return {ONE: torch.full(_shapes()[ONE], 0.0625)}
    whole = _full(param, quantity)
    assert whole is not None
    written = local_pattern(torch.empty(numels[writer]))
    changed = whole[torch.isin(whole.float(), written)].float().sort().values
    if not torch.equal(changed, written):
        raise AssertionError(f"{changed.numel()} elements of the whole changed where one rank wrote {numels[writer]}")
    return {ONE: whole.float()}


def _update(training: Training, quantity: str) -> Found:
    seen: Found = {}

    def doubled(name: str, whole: torch.Tensor) -> torch.Tensor:
        seen[name] = whole.float() * 2
        return whole * 2

    params = training.parameters()
    chosen = training.model if quantity == "value" else [(name, params[name]) for name in _names(quantity)]
    ds_fragment.update_many(chosen, doubled, what_of(quantity))
    return seen


def _load(training: Training, quantity: str) -> Found:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise Unsupported from None

    values = {name: pattern(name, shape) for name, shape in _shapes().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")  # every rank its own
        save_file(values, path)
        ds_fragment.load_full(training.model, path)
    return values


WRITES: Mapping[str, Callable[[Training, str], Found]] = {
    "write one": _write_one,
    "write many": _write_many,
    "local write": _write_local,
    "update": _update,
    "load": _load,
}
READS: Mapping[str, Callable[[Training, str], Found]] = {"read one": read_one, "read many": read_many}


def _names(quantity: str) -> list[str]:
    return list(_shapes()) if quantity == "value" else list(USED)


def _shapes() -> dict[str, torch.Size]:
    return {name: param.shape for name, param in Net().named_parameters()}


def _gathered(number: torch.Tensor) -> list[int]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [int(number)]
    numbers = [torch.zeros_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    return [int(one) for one in numbers]

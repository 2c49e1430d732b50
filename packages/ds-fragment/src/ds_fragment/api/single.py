"""One parameter at a time, under the names that users of `deepspeed.utils` know.

Every ``safe_get_full_*`` and every ``safe_set_*`` is collective: all ranks of the parameter's group must call it. The
``safe_get_local_*`` are not. On a GPU a read returns before its data is there, and an error of another rank is raised
by the next call: see `synchronize`. Writes, and calls inside `checked`, raise at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ds_fragment.api.write import set_local, set_many, update_many
from ds_fragment.engines import held_by
from ds_fragment.engines.counts import is_absent
from ds_fragment.engines.model import check_what
from ds_fragment.engines.shards import Shards
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, UnlinkedParameterError
from ds_fragment.record import registry


def get_local(param: torch.Tensor, what: str = "value") -> torch.Tensor:
    """This rank's piece of a quantity, a view of what the engine holds; empty where it holds nothing. No communication.

    Args:
        param: a parameter of the model.
        what: ``"value"``, ``"grad"``, ``"lp"`` (the weights that the model computes with: see `iter_full`), or the key
            of an optimizer state.

    Returns:
        1-D without padding for engines that flatten, the local tensor for a DTensor. A fresh tensor where the engine
        computes in another dtype than it keeps, or scales its gradients.

    Raises:
        FragmentError: there is no such quantity here, now.
    """
    with known_engine():
        adapter, param = held_by(param)
        piece = adapter.local(param, check_what(what))
        return (adapter.empty(param, what) if piece is None else piece).detach()


def state_keys(param: torch.Tensor) -> list[str]:
    """The keys of the optimizer's state for a parameter, ``step`` and other numbers included. No communication.

    Raises:
        UnlinkedParameterError: no optimizer was attached.
        StateNotReadyError: the optimizer has not stepped yet.
    """
    with known_engine():
        adapter, param = held_by(param)
        return sorted(adapter.state_keys(param))


def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor:
    """The whole fp32 value of a parameter, a fresh tensor. All ranks of its group must call it.

    A low-precision parameter that has no fp32 master anywhere is upcast.

    Args:
        param: a parameter of the model, sharded or not, lp or fp32.

    Returns:
        Of the parameter's whole shape, fp32.
    """
    return read_one(param, "value").float()


def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write the whole value into the fp32 pieces and into the lp weights. All ranks of its group must call it.

    Args:
        param: a parameter of the model.
        value: of the parameter's whole shape, any floating dtype, the same on every rank.

    Raises:
        InvalidValueError: wrong shape or dtype; on every rank, and nothing is written.
        RankMismatchError: the ranks were given different values.
    """
    set_many([(param, value)], "value")


def safe_get_full_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """The whole of one optimizer state of a parameter, a fresh tensor. All ranks of its group must call it.

    Args:
        param: a parameter of the model.
        optim_state_key: such as ``exp_avg``; ``step`` and other numbers come as 0-dimensional tensors.

    Returns:
        Of the state's whole shape and dtype; None, on every rank, for a parameter that does not require a gradient and
        has no state.

    Raises:
        UnlinkedParameterError: no optimizer was attached.
        StateNotReadyError: the optimizer has not stepped yet.
        StateKeyError: it keeps no such state, or keeps something that is no whole: neither a tensor nor a number, or
            another on each rank.
    """
    what = check_what(optim_state_key)
    return _or_none(param, lambda: read_one(param, what))


def safe_set_full_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Write the whole of one optimizer state. All ranks of the parameter's group must call it.

    Args:
        param: a parameter of the model.
        value: of the state's whole shape, the same on every rank.
        optim_state_key: such as ``exp_avg``.

    Raises:
        FragmentError: as `safe_get_full_optimizer_state` and `safe_set_full_fp32_param`; nothing is written.
    """
    set_many([(param, value)], check_what(optim_state_key))


def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The whole reduced gradient of a parameter, a fresh fp32 tensor. All ranks of its group must call it.

    Returns:
        Of the parameter's whole shape: the mean over the data-parallel ranks. None, on every rank, for a parameter that
        does not require a gradient and has none, and for one that this backward pass did not use, on any rank, where it
        used others. An engine may keep zeros for such a parameter, as DeepSpeed ZeRO-1 and 2 do: they are its gradient.

    Raises:
        GradientUnavailableError: it is not reduced yet, or was consumed already; or nothing tells which: outside
            DeepSpeed only an attached model knows whether the backward pass used other parameters.
    """
    found = _or_none(param, lambda: read_one(param, "grad"))
    return None if found is None else found.float()


def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write the whole reduced gradient. All ranks of the parameter's group must call it.

    Args:
        param: a parameter of the model.
        value: of the parameter's whole shape, any floating dtype, the same on every rank.

    Raises:
        FragmentError: there is no gradient to write to, or the value does not fit; nothing is written.
    """
    set_many([(param, value)], "grad")


def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor:
    """This rank's piece of the fp32 value: see `get_local`. No communication."""
    return get_local(param, "value")


def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's piece of the reduced gradient: see `get_local`. No communication.

    None where `safe_get_full_grad` is; but a rank that holds no piece of a parameter that requires a gradient may not
    know whether it was used, and gives an empty tensor.
    """
    return _or_none(param, lambda: get_local(param, "grad"))


def safe_get_local_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """This rank's piece of an optimizer state: see `get_local`. No communication.

    None where `safe_get_full_optimizer_state` is.
    """
    what = check_what(optim_state_key)
    return _or_none(param, lambda: get_local(param, what))


def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write this rank's piece of the fp32 value, and the lp weights. All ranks of its group must call it.

    Args:
        param: a parameter of the model.
        value: of the shape that `safe_get_local_fp32_param` gives on this rank.

    Raises:
        InvalidValueError: wrong shape or dtype on some rank; on every rank, and nothing is written.
    """
    set_local(param, value, "value")


def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write this rank's piece of the reduced gradient; as `safe_set_local_fp32_param`."""
    set_local(param, value, "grad")


def safe_set_local_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Write this rank's piece of an optimizer state; as `safe_set_local_fp32_param`."""
    set_local(param, value, check_what(optim_state_key))


def safe_update_full_grad_vectorized(
    param_list: Iterable[torch.Tensor], update_func: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Replace the whole reduced gradients of many parameters, all or none. All ranks must call it.

    Args:
        param_list: parameters of the model; those that do not require a gradient are left out.
        update_func: called as ``update_func(gradient, parameter)`` with the whole gradient; returns the new one.
    """
    chosen = [param for param in param_list if param.requires_grad]
    update_many(chosen, lambda param, grad: update_func(grad, param), "grad")


def read_one(param: torch.Tensor, what: str) -> torch.Tensor:
    """The whole of one quantity of one parameter, a fresh tensor."""
    return Shards([param], what, "safe_get_full").one()


def _or_none(param: torch.Tensor, read: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What is read; None where there is none because nothing trains or used the parameter, see `is_absent`."""
    try:
        return read()
    except FragmentError as error:
        if is_absent(param, error):
            return None
        raise


def get_full_hp_param(self: torch.Tensor, optim_state_key: str | None = None) -> torch.Tensor:
    """The whole fp32 value of a linked parameter, or of an optimizer state. All ranks of its group must call it."""
    _require_link(self)
    return safe_get_full_fp32_param(self) if optim_state_key is None else read_one(self, optim_state_key)


def set_full_hp_param(self: torch.Tensor, value: torch.Tensor, optim_state_key: str | None = None) -> None:
    """Write the whole fp32 value of a linked parameter, or an optimizer state. All ranks of its group must call it."""
    _require_link(self)
    set_many([(self, value)], "value" if optim_state_key is None else optim_state_key)


def get_full_hp_grad(self: torch.Tensor) -> torch.Tensor:
    """The whole reduced gradient of a linked parameter in fp32. All ranks of its group must call it."""
    _require_link(self)
    return read_one(self, "grad").float()


def set_full_hp_grad(self: torch.Tensor, value: torch.Tensor) -> None:
    """Write the whole reduced gradient of a linked parameter. All ranks of its group must call it."""
    _require_link(self)
    safe_set_full_grad(self, value)


def _require_link(param: torch.Tensor) -> None:
    if not hasattr(param, "_hp_mapping"):
        raise UnlinkedParameterError(
            f"{registry.name_of(param)} is not linked to a flat fp32 partition: call link_hp_params or make a "
            "FlatPartition"
        )

"""The operations as torch operators, for `torch.compile`: declared with what they write, and with a shape to trace."""

from __future__ import annotations

from typing import Any

import torch

_SCHEMAS = {
    "copy": "(Tensor(a!)[] dsts, Tensor[] srcs) -> ()",
    "gather_grads": (
        "(Tensor(a!)[] dsts, Tensor[] srcs, float scale, Tensor? scale_at, bool accumulate, Tensor(b!)? found_inf)"
        " -> Tensor"
    ),
    "norm": "(Tensor[] tensors) -> Tensor",
    "publish": "(Tensor(a!)[] dsts, Tensor[] srcs, int seed, Tensor? seed_at) -> ()",
}
_WRITES: dict[str, tuple[str, ...]] = {
    "copy": ("dsts",),
    "gather_grads": ("dsts", "found_inf"),
    "norm": (),
    "publish": ("dsts",),
}


def _copy(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> None:
    from ds_fragment.kernels import functions

    functions.copy(dsts, srcs)


def _gather_grads(
    dsts: list[torch.Tensor],
    srcs: list[torch.Tensor],
    scale: float,
    scale_at: torch.Tensor | None,
    accumulate: bool,
    found_inf: torch.Tensor | None,
) -> torch.Tensor:
    from ds_fragment.kernels import functions

    by = scale if scale_at is None else scale_at
    return functions.gather_grads(dsts, srcs, scale=by, accumulate=accumulate, found_inf=found_inf).values


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    from ds_fragment.kernels import functions

    return functions.norm(tensors).values


def _publish(dsts: list[torch.Tensor], srcs: list[torch.Tensor], seed: int, seed_at: torch.Tensor | None) -> None:
    from ds_fragment.kernels import functions

    functions.publish(dsts, srcs, seed=seed if seed_at is None else seed_at)


def _no_output(*_: Any) -> None:
    return None


def _three(tensors: list[torch.Tensor], *_: Any) -> torch.Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(3, dtype=torch.float64, device=device)


def _define(name: str, run: Any, fake: Any) -> Any:
    op = torch.library.custom_op(f"ds_fragment::{name}", run, mutates_args=_WRITES[name], schema=_SCHEMAS[name])
    op.register_fake(fake)
    return op


copy = _define("copy", _copy, _no_output)
gather_grads = _define("gather_grads", _gather_grads, _three)
norm = _define("norm", _norm, _three)
publish = _define("publish", _publish, _no_output)

"""See what does nothing on meta: several initialisers of ``torch.nn.init``, and the scattering of DTensor.

Initialisers that draw until the values fit, or factorise (``trunc_normal_``, ``orthogonal_``), begin with
``if tensor.is_meta: return tensor``: no operator follows that could be recorded. That question itself passes through
the function mode, which is where the call is recorded instead, to be made as a whole on the real device.

``distribute_tensor`` lets the first rank of a mesh scatter its shards, and skips that on meta in the same way. Ranks
that build the same model from the same seed have the same shards, so each rank copies its own.
"""

from __future__ import annotations

import sys
from types import FrameType, FunctionType
from typing import Any

import torch

from ds_ondevice._recording import active_recorder

IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]

# What fills a tensor that is there with random numbers.
DRAWING: frozenset[Any] = frozenset(
    {
        torch.Tensor.bernoulli_,
        torch.Tensor.cauchy_,
        torch.Tensor.exponential_,
        torch.Tensor.geometric_,
        torch.Tensor.log_normal_,
        torch.Tensor.normal_,
        torch.Tensor.random_,
        torch.Tensor.uniform_,
        torch.nn.init.kaiming_normal_,
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.normal_,
        torch.nn.init.orthogonal_,
        torch.nn.init.sparse_,
        torch.nn.init.trunc_normal_,
        torch.nn.init.uniform_,
        torch.nn.init.xavier_normal_,
        torch.nn.init.xavier_uniform_,
    }
)


def is_question_of_initializer(func: Any, caller: FrameType) -> bool:
    """Whether an initialiser, running in frame ``caller``, asks whether its tensor is on meta."""
    return func == IS_META and caller.f_globals is vars(torch.nn.init)


def note_skipped(tensor: torch.Tensor, caller: FrameType) -> None:
    """Record what frame ``caller`` would do, if it asks whether ``tensor`` is on meta in order not to do it."""
    recorder = active_recorder()
    if recorder is None or not tensor.is_meta:
        return
    code, given = caller.f_code, caller.f_locals
    if caller.f_globals is vars(torch.nn.init) and not code.co_freevars:
        # Made anew of its code: under its name in torch.nn.init may stand a function that somebody wrapped around it.
        initializer = FunctionType(code, caller.f_globals, code.co_name)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        recorder.record_call(initializer, (), {name: given[name] for name in names}, tensor, random=True)
    elif code is _code_of_mesh_scatter():
        mesh, dim = given["mesh"], given["mesh_dim"]
        coordinate = mesh.get_coordinate()
        if coordinate is not None:
            with torch.no_grad():
                tensor.copy_(given["scatter_list"][coordinate[dim]])


def _code_of_mesh_scatter() -> object:
    module = sys.modules.get("torch.distributed.tensor._collective_utils")
    scatter = getattr(module, "mesh_scatter", None)
    return getattr(scatter, "__code__", None) or 0

"""`ZeroRedundancyOptimizer`: parameters are whole on every rank, each one's optimizer state is on one rank alone.

Only the owner of a state has its shape and dtype: the ranks exchange those once, for all parameters together.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ds_fragment.engines.base import is_state, state_entry
from ds_fragment.engines.loaded import is_a
from ds_fragment.engines.optimized import Optimized
from ds_fragment.engines.plain import PlainAdapter
from ds_fragment.errors import StateKeyError, StateNotReadyError
from ds_fragment.layout import Fragment, Layout
from ds_fragment.record import record_of, registry
from ds_fragment.sharding import Sharding

# By parameter index: by state key, shape and dtype; or why it cannot be read.
_Table = dict[int, dict[str, tuple[torch.Size, torch.dtype] | str]]


class ZeroRedundancyAdapter(PlainAdapter):
    """Claims parameters whose attached optimizer is a ZeroRedundancyOptimizer."""

    name = "zero redundancy optimizer"

    def __init__(self) -> None:
        self._tables: MutableMapping[Any, _Table] = weakref.WeakKeyDictionary()  # by optimizer

    def empty(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """Of the parameter's dtype: only the owner of a state knows that of the state."""
        return param.detach().new_empty(0)

    def writers(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The ranks that the optimizer's state is spread over."""
        return (_optimizer(param).process_group,)

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the attached optimizer is one."""
        return is_a(registry.optimizer_of(param), "torch.distributed.optim", "ZeroRedundancyOptimizer")

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """Whole on every rank; optimizer state is the owner's to send. The first call for state is collective."""
        if not is_state(what):
            return super().sharding(param, what)
        optimizer = _optimizer(param)
        state = self._table(optimizer).get(optimizer._param_to_index[param], {})
        if not state:
            raise StateNotReadyError(
                f"{registry.name_of(param)} has no optimizer state yet: the optimizer makes it at its first step"
            )
        if what not in state:
            raise StateKeyError(
                f"optim_state_key '{what}' is not kept for {registry.name_of(param)}; its optimizer keeps "
                f"{sorted(state)}"
            )
        known = state[what]
        if isinstance(known, str):
            raise StateKeyError(known)
        group, owner = optimizer.process_group, optimizer._param_to_rank[param]

        def make() -> Sharding:
            shape, dtype = known
            everything = Fragment((0,) * len(shape), tuple(shape))
            fragments = tuple(everything if rank == owner else None for rank in range(group.size()))
            return Sharding(shape, dtype, param.device, Layout(tuple(shape), fragments), group)

        return record_of(param).sharding(what, (*known, owner, group), make)

    def _table(self, optimizer: Any) -> _Table:
        """The state that the ranks keep; every rank tells it to all others, at each call until all have state."""
        found = self._tables.get(optimizer)
        if found is None:
            mine: _Table = {
                optimizer._param_to_index[param]: {key: _metadata(state, param, key) for key in state}
                for param, state in optimizer.optim.state.items()
                if state
            }
            tables: list[Any] = [None] * optimizer.process_group.size()
            dist.all_gather_object(tables, mine, group=optimizer.process_group)
            found = {index: state for table in tables for index, state in table.items()}
            if len(found) == len(optimizer._param_to_index):
                self._tables[optimizer] = found
        return found

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:  # type: ignore[override]
        """The whole; of state None unless this rank owns it."""
        if not is_state(what):
            return super().local(param, what)
        optimizer = _optimizer(param)
        if optimizer._param_to_rank[param] != optimizer.process_group.rank():
            return None
        return state_entry(optimizer.optim.state[param], param, what, quantised=True)

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the owner's state; collective like the first read of state."""
        optimizer = _optimizer(param)
        return list(self._table(optimizer).get(optimizer._param_to_index[param], {}))

    def optimized(self, params: Sequence[torch.Tensor]) -> list[Optimized | None]:
        """State with the owner alone, in the owner's local optimizer; groups are set in the common one."""
        found: list[Optimized | None] = []
        for param, each in zip(params, super().optimized(params), strict=True):
            common = _optimizer(param)
            owns = common._param_to_rank[param] == common.process_group.rank()
            kind = common._optim_constructor.__name__
            found.append(each and replace(each, optimizer=common.optim if owns else None, kind=kind))
        return found

    def forget_state(self, params: Sequence[torch.Tensor]) -> None:
        """And have the ranks exchange anew who keeps what."""
        super().forget_state(params)
        for optimizer in {id(each): each for each in map(_optimizer, params)}.values():
            self._tables.pop(optimizer, None)


def _metadata(state: dict[str, Any], param: torch.Tensor, key: str) -> tuple[torch.Size, torch.dtype] | str:
    """Shape and dtype of a state, for the other ranks; or the reason why it cannot be read."""
    try:
        entry = state_entry(state, param, key, quantised=True)
    except StateKeyError as error:
        return str(error)
    return entry.shape, entry.dtype


def _optimizer(param: torch.Tensor) -> Any:
    return registry.optimizer_of(param)

"""`ZeroRedundancyOptimizer`: parameters are whole on every rank, each one's optimizer state is on one rank alone.

What state a rank keeps only that rank knows, so shapes and dtypes travel once, for all parameters together.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.engines.base import Adapter, is_state, state_entry
from ds_fragment.engines.loaded import is_a
from ds_fragment.engines.plain import PlainAdapter
from ds_fragment.errors import StateKeyError, StateNotReadyError
from ds_fragment.layout import Fragment, Layout
from ds_fragment.record import registry
from ds_fragment.sharding import Sharding

# By parameter index: by state key, shape and dtype; or why it cannot be read.
_Table = dict[int, dict[str, tuple[torch.Size, torch.dtype] | str]]


class ZeroRedundancyAdapter(Adapter):
    """Claims parameters whose attached optimizer is a ZeroRedundancyOptimizer."""

    name = "zero redundancy optimizer"

    def __init__(self) -> None:
        self._plain = PlainAdapter()
        self._tables: MutableMapping[Any, tuple[_Table, dict[tuple[int, str], Sharding]]] = weakref.WeakKeyDictionary()

    def learn(self, model: nn.Module) -> None:
        """What DistributedDataParallel says of the gradients."""
        self._plain.learn(model)

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
            return self._plain.sharding(param, what)
        optimizer = _optimizer(param)
        index = optimizer._param_to_index[param]
        table, shardings = self._table(optimizer)
        state = table.get(index, {})
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
        if (index, what) not in shardings:
            shape, dtype = known
            group = optimizer.process_group
            owner = optimizer._param_to_rank[param]
            everything = Fragment((0,) * len(shape), tuple(shape))
            fragments = tuple(everything if rank == owner else None for rank in range(group.size()))
            shardings[index, what] = Sharding(shape, dtype, param.device, Layout(tuple(shape), fragments), group)
        return shardings[index, what]

    def _table(self, optimizer: Any) -> tuple[_Table, dict[tuple[int, str], Sharding]]:
        """What state there is; told by all ranks to all as long as some have none."""
        found = self._tables.get(optimizer)
        if found is None:
            mine: _Table = {
                optimizer._param_to_index[param]: {key: _metadata(state, param, key) for key in state}
                for param, state in optimizer.optim.state.items()
                if state
            }
            tables: list[Any] = [None] * optimizer.process_group.size()
            dist.all_gather_object(tables, mine, group=optimizer.process_group)
            found = ({index: state for table in tables for index, state in table.items()}, {})
            if len(found[0]) == len(optimizer._param_to_index):
                self._tables[optimizer] = found
        return found

    def stamps(self, params: Sequence[torch.Tensor], what: str) -> Sequence[object]:
        """Nothing that lasts: what tells is collective as long as some ranks have no state."""
        return [object() for _ in params]

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """The whole, where it is."""
        if not is_state(what):
            return self._plain.local(param, what)
        optimizer = _optimizer(param)
        if optimizer._param_to_rank[param] != optimizer.process_group.rank():
            return None
        return state_entry(optimizer.optim.state[param], param, what, quantised=True)

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the owner's state; collective like the first read of state."""
        optimizer = _optimizer(param)
        return list(self._table(optimizer)[0].get(optimizer._param_to_index[param], {}))

    def master(self, param: torch.Tensor) -> str:
        """As for a plain parameter."""
        return self._plain.master(param)

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """As for plain parameters."""
        self._plain.refresh_lp(params, values)


def _metadata(state: dict[str, Any], param: torch.Tensor, key: str) -> tuple[torch.Size, torch.dtype] | str:
    """What travels of a state; why not, for the ranks that have to be told."""
    try:
        entry = state_entry(state, param, key, quantised=True)
    except StateKeyError as error:
        return str(error)
    return entry.shape, entry.dtype


def _optimizer(param: torch.Tensor) -> Any:
    return registry.optimizer_of(param)

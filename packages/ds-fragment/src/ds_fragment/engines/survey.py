"""Where one quantity of many parameters is: found out once, and from then on only checked to be so still."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ds_fragment.collective.exchange import Plan, Sharding
from ds_fragment.collective.recent import Recent
from ds_fragment.engines import Adapter, held_by
from ds_fragment.engines.base import is_weight
from ds_fragment.engines.versions import engine_changed, known_engine
from ds_fragment.errors import FragmentError
from ds_fragment.record import records_of, registry


class Survey:
    """Where one quantity of some parameters is: found out once, good until one of them is held in another way.

    It is good until a parameter has another record, something was attached since, or what its place follows from
    (the adapter's `stamps`) is not the same.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str, adapters: Sequence[Adapter]) -> None:
        self.what, self.generation = what, registry.generation
        self.error: FragmentError | None = None
        self.adapters = list(adapters)
        by_adapter: dict[Adapter, list[int]] = {}
        for item, adapter in enumerate(self.adapters):
            by_adapter.setdefault(adapter, []).append(item)
        self.by_adapter = list(by_adapter.items())
        for adapter, items in self.by_adapter:
            adapter.prepare([params[item] for item in items])
        self._records = records_of(params)
        self.homes = [adapter.sharding(param, "value") for adapter, param in zip(self.adapters, params, strict=True)]
        self.shardings = self.homes if what == "value" else [self._place(param, i) for i, param in enumerate(params)]
        self.held = [sharding.layout.held(sharding.rank) for sharding in self.shardings]
        self.groups = list(dict.fromkeys(group for sharding in self.homes for group in sharding.groups))
        self.settle = self.to_settle(self.shardings)
        self.shared = self.to_compare(params, self.shardings)
        self.agreed_at: int | None = None  # what `_agreements` counted when all was as agreed
        self.plan: tuple[int | None, Plan] | None = None  # the last one, and the bucket_bytes that were asked for
        self._stamps = [] if self.error is not None else self._stamps_of(params)

    def _place(self, param: torch.Tensor, item: int) -> Sharding:
        try:
            return self.adapters[item].sharding(param, self.what)
        except (FragmentError, AttributeError, KeyError) as error:
            told = error if isinstance(error, FragmentError) else engine_changed(error)
            if told is None:
                raise
            if told is not error:
                told.__cause__ = error
            self.error = self.error or told
            return self.homes[item]

    def to_settle(self, shardings: Sequence[Sharding]) -> Sequence[dist.ProcessGroup]:
        """The groups whose ranks each hold something whole that some of them may lack."""
        groups: dict[dist.ProcessGroup, None] = {}
        if not is_weight(self.what):
            for sharding, home in zip(shardings, self.homes, strict=True):
                if sharding.alone:
                    groups.update(dict.fromkeys(home.shards or home.replicas))
        return tuple(groups)

    def scope(self, item: int, param: torch.Tensor, sharding: Sharding) -> tuple[dist.ProcessGroup, ...]:
        """The groups whose ranks write a parameter together, given where the quantity is."""
        writers = self.adapters[item].writers(param)
        return tuple(dict.fromkeys((*self.homes[item].groups, *sharding.groups, *writers)))

    def to_compare(
        self, params: Sequence[torch.Tensor], shardings: Sequence[Sharding]
    ) -> tuple[list[int], list[tuple[dist.ProcessGroup, ...]]]:
        """The parameters whose gradient or state each of several ranks holds whole, and the groups of those ranks."""
        items, scopes = [], []
        for item, sharding in enumerate(() if is_weight(self.what) else shardings):
            if sharding.alone:
                groups = self.scope(item, params[item], sharding)
                scope = tuple(group for group in groups if group.size() > 1)
                if scope:
                    items.append(item)
                    scopes.append(scope)
        return items, scopes

    def _stamps_of(self, params: Sequence[torch.Tensor]) -> list[Sequence[object]]:
        if len(self.by_adapter) == 1:
            return [self.adapters[0].stamps(params, self.what)]
        return [adapter.stamps([params[i] for i in items], self.what) for adapter, items in self.by_adapter]

    def holds(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether it is still good for these parameters, which have the ids of those that it was made for."""
        if records_of(params) != self._records or self.generation != registry.generation:
            return False
        try:
            return self._stamps_of(params) == self._stamps
        except (FragmentError, LookupError, AttributeError):
            return False


surveys = Recent[Survey](most=50_000)  # parameters


def survey_of(params: Sequence[torch.Tensor], what: str) -> tuple[Survey, Sequence[torch.Tensor]]:
    """The survey of a quantity of the parameters, made now unless there is one that is still good; and the parameters.

    In the place of gathered copies they are those that they are copies of. How long a copy is one nothing tells: such a
    survey is made anew each time.
    """
    key = (what, *map(id, params))
    found = surveys.get(key)
    if found is not None and found.holds(params):
        return found, params
    with known_engine():
        held = list(map(held_by, params))
        own = [param for _, param in held]
        made = Survey(own, what, [adapter for adapter, _ in held])
    if made.error is None and list(map(id, own)) == list(map(id, params)):  # an error refers to more by its traceback
        surveys.put(key, made, len(params))
    return made, own

"""Flat partitions: parameters linked with `link_hp_params`, by `FlatPartition` or by an engine of the user's.

`param._hp_mapping`, the attribute that engines read, says where this rank's fragment is; it is None on a rank that
holds no part of the parameter. A `FlatLink` in the parameter's record is there on every rank, and gives the layout on
all of them once the ranks have exchanged their slices.

[Note: slices] Each rank's partition is a slice of the concatenation of the parameters, and the slices may differ in
size. A rank knows its own. The first collective call about the parameters gathers those of all ranks, in one small
collective for each `link_hp_params`; `FlatPartition` cuts evenly and knows them from the start.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist

from ds_fragment import _collectives
from ds_fragment.engines.base import Adapter, is_state, spread, state_entry, state_of
from ds_fragment.engines.optimized import Optimized, optimized_by
from ds_fragment.engines.state import other_shape
from ds_fragment.errors import (
    FragmentError,
    GradientUnavailableError,
    InvalidValueError,
    RankMismatchError,
    UnlinkedParameterError,
)
from ds_fragment.layout import Layout, interval, overlap, whole
from ds_fragment.record import noted, record_of, registry
from ds_fragment.sharding import Sharding


class FlatOwner(Protocol):
    """The object that keeps a flat partition and knows the stage of its gradients."""

    def no_gradient(self, param: torch.Tensor) -> GradientUnavailableError | None:
        """The error where there is no reduced gradient of the parameter now, None where there is one."""


class Slices:
    """The slices of the ranks of a group, shared by the parameters of one `link_hp_params`; see [Note: slices].

    Args:
        group: the ranks; None for one rank without torch.distributed.
        mine: this rank's slice of the concatenation, (start, numel).
        spans: where each parameter lies in the concatenation, (start, numel), the same on every rank.
        device: of the partition.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        mine: tuple[int, int],
        spans: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self.group, self.mine, self._spans, self._device = group, mine, spans, device
        self.known: tuple[tuple[int, int], ...] | None = None  # by group rank

    def gather(self) -> None:
        """Learn the slices of all ranks; every rank of the group must call it.

        Raises:
            RankMismatchError: the ranks linked different parameters, or other offsets; on every rank.
            InvalidValueError: two slices overlap, or none holds some elements; on every rank.
        """
        if self.group is None or self.group.size() == 1:
            rows = [[*self.mine, 0]]
        else:
            digest = int.from_bytes(hashlib.sha256(repr(self._spans).encode()).digest()[:7], "little")
            device = _collectives.device_for(self.group, self._device)
            row = torch.tensor([*self.mine, digest], dtype=torch.int64, device=device)
            table = torch.empty(self.group.size(), 3, dtype=torch.int64, device=row.device)
            _collectives.leave_gently(row.device.type)
            _collectives.all_gather(table.view(-1), row, group=self.group)
            rows = table.tolist()
        if len({digest for _, _, digest in rows}) > 1:
            raise RankMismatchError(
                "link_hp_params: the ranks linked parameters of other sizes, or at other param_offsets; pass the same "
                "lp_param_list and param_offsets on every rank"
            )
        slices = tuple((start, numel) for start, numel, _ in rows)
        _check_cover(slices, self._spans)
        self.known = slices

    def layout(self, start: int, numel: int) -> Layout:
        """The fragments of a parameter that lies there in the concatenation.

        Raises:
            FragmentError: the other ranks' slices are not known yet.
        """
        if self.known is None:
            raise FragmentError(
                "where the other ranks' partitions lie is not known before the first collective read or write of "
                "parameters that link_hp_params linked: make one on every rank, such as safe_get_full_fp32_param"
            )
        pieces = [overlap(start, numel, begin, size) for begin, size in self.known]
        return Layout((numel,), tuple(interval(first - start, count) for first, count in pieces))


def _check_cover(slices: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> None:
    """Raise unless every element of the parameters is in exactly one slice."""
    in_order = sorted((start, start + numel) for start, numel in slices if numel)
    for (first, end), (begin, last) in pairwise(in_order):
        if begin < end:
            raise InvalidValueError(
                f"partitions overlap: link_hp_params was given elements {first} to {end} on one rank and {begin} to "
                f"{last} on another; partition_start and partition_size must cut the parameters into disjoint slices"
            )
    for start, numel in spans:
        held = sum(overlap(start, numel, begin, size)[1] for begin, size in slices)
        if held != numel:
            raise InvalidValueError(
                f"a parameter at offset {start} has {numel} elements, of which the ranks' partitions hold {held}: "
                f"by group rank they begin and end at {[(begin, begin + size) for begin, size in slices]}"
            )


@dataclass(slots=True, eq=False)
class FlatLink:
    """One parameter in a flat partition.

    Attributes:
        slices: of the ranks.
        start: where the parameter begins in the concatenation, in elements.
        numel: its elements.
        group: the ranks that the partition is cut over; None for one rank without torch.distributed.
        flat: this rank's flat fp32 partition, weakly.
        dtype: of the partition.
        device: of the partition.
        owner: what made the link, weakly; None for `link_hp_params` called alone.
        engine_sought: whether a DeepSpeed engine that calls `link_hp_params` was looked for.
    """

    slices: Slices
    start: int
    numel: int
    group: dist.ProcessGroup | None
    flat: weakref.ref[torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    owner: weakref.ref[FlatOwner] | None = None
    engine_sought: bool = False

    def partition(self, param: torch.Tensor) -> torch.Tensor:
        """This rank's flat fp32 partition.

        Raises:
            UnlinkedParameterError: it was deleted.
        """
        flat = self.flat()
        if flat is None:
            raise UnlinkedParameterError(
                f"{registry.name_of(param)} is linked to a flat fp32 partition that was deleted: keep the partition "
                "(or its FlatPartition) alive, or unlink_hp_params"
            )
        return flat

    def sharding(self, param: torch.Tensor, kind: str, dtype: torch.dtype, device: torch.device) -> Sharding:
        """Where a quantity of the linked parameter is that is cut like the partition; ``kind`` is its key."""

        def make() -> Sharding:
            return Sharding(param.shape, dtype, device, self.slices.layout(self.start, self.numel), self.group)

        return record_of(param).sharding(kind, self, make)


def link_of(param: torch.Tensor) -> FlatLink | None:
    """The parameter's link, or None."""
    return noted(param, FlatLink)


class FlatAdapter(Adapter):
    """Claims every parameter that was linked here; those that DeepSpeed linked are not its own."""

    name = "flat partition"
    marks = (FlatLink,)

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the parameter was linked by `link_hp_params` or a `FlatPartition`."""
        return hasattr(param, "_hp_mapping") and link_of(param) is not None

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """An interval of the flattened parameter on each rank; optimizer state that is one number is whole on each."""
        link = _link(param)
        if what == "lp":
            like = (param.shape, param.dtype, param.device)
            return record_of(param).sharding(what, like, lambda: Sharding(*like, whole(param.shape), None))
        if is_state(what):
            (entry,) = _attached_entries([link], [param], what)
            if entry is not None and entry.shape != link.partition(param).shape:
                return Sharding(entry.shape, entry.dtype, entry.device, whole(entry.shape), None)
            what = "state"
        return link.sharding(param, what, link.dtype, link.device)

    def versions(self, params: Sequence[torch.Tensor]) -> Sequence[object]:
        """The links, which are new objects whenever a parameter is linked."""
        return [hasattr(param, "_hp_mapping") and link_of(param) for param in params]

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As `local`; the optimizer is asked for state once for each partition."""
        if not is_state(what):
            return super().pieces(params, what)
        links = list(map(_link, params))
        triples = zip(links, params, _attached_entries(links, params, what), strict=True)
        return [_local_state(link, param, what, entry) for link, param, entry in triples]

    def prepare(self, params: Sequence[torch.Tensor]) -> None:
        """Gather the slices of all ranks where they are not known yet."""
        links = [link for param in params if (link := link_of(param)) is not None]
        for slices in dict.fromkeys(link.slices for link in links):
            if slices.known is None:
                slices.gather()

    def empty(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """A piece of no elements, of the partition's dtype."""
        link = _link(param)
        return torch.empty(0, dtype=link.dtype, device=link.device)

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """This rank's fragment; of the lp parameter the whole."""
        if what == "lp":
            return param.detach()
        if is_state(what):
            return self.pieces([param], what)[0]
        link, mapping = _link(param), param._hp_mapping  # type: ignore[attr-defined]
        link.partition(param)
        if what == "grad":
            owner = None if link.owner is None else link.owner()
            error = None if owner is None else owner.no_gradient(param)
            if error is not None:
                raise error
        if mapping is None:
            return None
        if what == "value":
            fragment: torch.Tensor = mapping.get_hp_fragment()
            return fragment
        gradient: torch.Tensor = mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]
        held = mapping.get_hp_fragment_address().numel
        if gradient.numel() != held:
            raise GradientUnavailableError(
                f"{registry.name_of(param)}: its entry in the gradient table has {gradient.numel()} elements for the "
                f"{held} of its fragment; where a DeepSpeed engine keeps whole gradients, call attach(engine) first"
            )
        return gradient

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the attached optimizer's state, else of the linked fragment's."""
        flat = _link(param).partition(param)
        if registry.optimizer_of(flat) is not None:
            return list(state_of(flat, param))
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        keys: list[str] = [] if mapping is None else mapping.get_optim_state_keys()
        return keys

    def optimized(self, params: Sequence[torch.Tensor]) -> list[Optimized | None]:
        """By the optimizer of the partition."""
        flats = [_link(param).partition(param) for param in params]
        return optimized_by(list(map(registry.optimizer_of, flats)), flats)

    def master(self, param: torch.Tensor) -> str:
        """A flat partition is a true master."""
        return "fp32"

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Cast the fp32 fragments and gather them into the lp parameters, or cast the whole values."""
        if values is not None:
            for param, value in zip(params, values, strict=True):
                param.data.copy_(value.to(_link(param).dtype))
            return
        publish(params)


def publish(params: Sequence[torch.Tensor]) -> None:
    """Write the fp32 fragments into the whole lp parameters of every rank, cast by their holders.

    All ranks of the parameters' groups must call it.
    """
    shardings = [_link(param).sharding(param, "lp", param.dtype, param.device) for param in params]
    adapter = FlatAdapter()
    spread(params, shardings, lambda items: adapter.pieces([params[i] for i in items], "value"))


def _link(param: torch.Tensor) -> FlatLink:
    link = link_of(param)
    if link is None:
        raise UnlinkedParameterError(
            f"{registry.name_of(param)} has _hp_mapping but no rank's layout is known: link it with link_hp_params or "
            "FlatPartition, or attach its engine"
        )
    return link


def _attached_entries(links: Sequence[FlatLink], params: Sequence[torch.Tensor], key: str) -> list[torch.Tensor | None]:
    """The state of each partition in the attached optimizer, the same on every rank up to its values.

    None where no optimizer is attached. Parameters of one partition have the same entry, which is looked up once.
    """
    found: dict[int, torch.Tensor | None] = {}
    entries = []
    for link, param in zip(links, params, strict=True):
        flat = link.partition(param)
        if id(flat) not in found:
            attached = registry.optimizer_of(flat) is not None
            entry = state_entry(state_of(flat, param), param, key) if attached else None
            if entry is not None and entry.numel() != 1 and entry.shape != flat.shape:
                raise other_shape(entry, param, key, flat.shape)
            found[id(flat)] = entry
        entries.append(found[id(flat)])
    return entries


def _local_state(link: FlatLink, param: torch.Tensor, key: str, entry: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of the attached optimizer's entry; without an optimizer, of the state linked to the fragment."""
    flat, mapping = link.partition(param), param._hp_mapping  # type: ignore[attr-defined]
    if entry is not None:
        if entry.shape != flat.shape:
            return entry
        if mapping is None:
            return None
        address = mapping.get_hp_fragment_address()
        return _wide(entry, flat, param, key).narrow(0, address.start, address.numel)
    if mapping is None:
        return None
    fragment = mapping.get_optim_state_fragment(key)
    if not isinstance(fragment, torch.Tensor) or fragment.numel() != mapping.get_hp_fragment_address().numel:
        raise InvalidValueError(
            f"optim_state_key '{key}' of {registry.name_of(param)} is not one number for each element, and ranks "
            "without a part of the parameter do not hold it: call attach(model, optimizer) on every rank to read it"
        )
    return _wide(fragment, flat, param, key)


def _wide(entry: torch.Tensor, flat: torch.Tensor, param: torch.Tensor, key: str) -> torch.Tensor:
    """The entry, if every number in it is exact in the partition's dtype."""
    if entry.dtype != flat.dtype and not (entry.dtype.is_floating_point and entry.dtype.itemsize < flat.dtype.itemsize):
        raise FragmentError(
            f"optim_state_key '{key}' of {registry.name_of(param)} has dtype {entry.dtype}, which the fp32 exchange of "
            "a flat partition cannot carry exactly"
        )
    return entry

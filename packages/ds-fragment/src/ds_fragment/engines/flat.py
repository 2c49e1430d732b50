"""Flat partitions: parameters linked with `link_hp_params`, by `FlatPartition` or by an engine of the user's.

`param._hp_mapping` says where this rank's fragment is, the `FlatLink` beside it where every rank's are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_fragment.engines.base import Adapter, is_state, spread, state_entry, state_of
from ds_fragment.engines.links import FlatLink, link_of
from ds_fragment.engines.state import other_shape
from ds_fragment.errors import FragmentError, GradientUnavailableError, InvalidValueError, UnlinkedParameterError
from ds_fragment.layout import whole
from ds_fragment.record import record_of, registry
from ds_fragment.sharding import Sharding


class FlatAdapter(Adapter):
    """Claims every parameter that was linked here; those that DeepSpeed linked are not its own."""

    name = "flat partition"

    def claims(self, param: torch.Tensor) -> bool:
        """Whether the parameter was linked by `link_hp_params` or a `FlatPartition`."""
        return hasattr(param, "_hp_mapping") and link_of(param) is not None

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """An interval of the flattened parameter on each rank; optimizer state that is one number is whole on each."""
        link = _link(param)
        if is_state(what):
            flat = _flat(link, param)
            entry = _attached_entry(flat, param, what)
            if entry is not None and entry.shape != flat.shape:
                return Sharding(entry.shape, entry.dtype, entry.device, whole(entry.shape), None)
            what = "state"
        if what == "lp":
            return record_of(param).sharding(
                ("whole", param.dtype, param.device),
                param.shape,
                lambda: Sharding(param.shape, param.dtype, param.device, whole(param.shape), None),
            )
        if what not in link.shardings:
            link.shardings[what] = Sharding(param.shape, link.dtype, link.device, link.layout(), link.group)
        return link.shardings[what]

    def stamps(self, params: Sequence[torch.Tensor], what: str) -> Sequence[object]:
        """The links, which are made anew whenever a parameter is linked; what state is, the optimizer says."""
        if not is_state(what):
            return [hasattr(param, "_hp_mapping") and link_of(param) for param in params]
        links = list(map(_link, params))
        entries = _attached_entries(links, params, what)
        kinds = [None if entry is None else (entry.shape, entry.dtype, entry.device) for entry in entries]
        return list(zip(links, kinds, strict=True))

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As `local`; optimizer state is asked for once for each partition."""
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
        _flat(link, param)
        if what == "grad":
            self._check_gradient(param, link)
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

    def _check_gradient(self, param: torch.Tensor, link: FlatLink) -> None:
        owner = link.owner() if link.owner is not None else None
        error = None if owner is None else owner.no_gradient(param)
        if error is not None:
            raise error

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the attached optimizer's state, else of the linked fragment's."""
        flat = _flat(_link(param), param)
        if registry.optimizer_of(flat) is not None:
            return list(state_of(flat, param))
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        keys: list[str] = [] if mapping is None else mapping.get_optim_state_keys()
        return keys

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
    shardings = []
    for param in params:
        link = _link(param)
        if "lp" not in link.shardings:
            link.shardings["lp"] = Sharding(param.shape, param.dtype, param.device, link.layout(), link.group)
        shardings.append(link.shardings["lp"])
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


def _flat(link: FlatLink, param: torch.Tensor) -> torch.Tensor:
    flat = link.flat()
    if flat is None:
        raise UnlinkedParameterError(
            f"{registry.name_of(param)} is linked to a flat fp32 partition that was deleted: keep the partition (or "
            "its FlatPartition) alive, or unlink_hp_params"
        )
    return flat


def _attached_entry(flat: torch.Tensor, param: torch.Tensor, key: str) -> torch.Tensor | None:
    """The state of the attached optimizer, the same on every rank up to its values; None without an optimizer."""
    if registry.optimizer_of(flat) is None:
        return None
    entry = state_entry(state_of(flat, param), param, key)
    if entry.numel() != 1 and entry.shape != flat.shape:
        raise other_shape(entry, param, key, flat.shape)
    return entry


def _attached_entries(links: Sequence[FlatLink], params: Sequence[torch.Tensor], key: str) -> list[torch.Tensor | None]:
    """`_attached_entry` for each parameter; those of one partition have the same."""
    found: dict[int, torch.Tensor | None] = {}
    entries = []
    for link, param in zip(links, params, strict=True):
        flat = _flat(link, param)
        if id(flat) not in found:
            found[id(flat)] = _attached_entry(flat, param, key)
        entries.append(found[id(flat)])
    return entries


def _local_state(link: FlatLink, param: torch.Tensor, key: str, entry: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of the attached optimizer's entry; of what is linked to the fragment where there is none."""
    flat, mapping = _flat(link, param), param._hp_mapping  # type: ignore[attr-defined]
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
    if entry.dtype != flat.dtype and not (entry.dtype.is_floating_point and entry.dtype.itemsize < flat.dtype.itemsize):
        raise FragmentError(
            f"optim_state_key '{key}' of {registry.name_of(param)} has dtype {entry.dtype}, which the fp32 exchange of "
            "a flat partition cannot carry exactly"
        )
    return entry

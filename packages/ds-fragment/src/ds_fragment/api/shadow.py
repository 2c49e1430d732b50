"""An exponential moving average of a sharded model's weights, kept as shards: training sends nothing for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_fragment.api.shards import agree_writable, located, refresh_value
from ds_fragment.api.write import agree_on
from ds_fragment.collective.exchange import Locate, Shards as Found
from ds_fragment.engines.model import Named, check_what, named
from ds_fragment.engines.shards import Shards
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, InvalidValueError
from ds_fragment.sharding import Sharding

_AVERAGED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Shadow:
    """A copy of this rank's shards that follows the weights slowly, and takes their place for an evaluation.

    All ranks of the parameters' groups must make it, with the same parameters.

    Args:
        params: a module, parameters, or (name, parameter) pairs. The shadow keeps a reference to them.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        dtype: of the copy, floating-point; that of the quantity unless told. A low-precision copy loses updates: bf16
            has 8 significant bits, so that a step of less than 1/512 of an element is rounded away.

    Raises:
        InvalidValueError: ``dtype``, or the dtype of a shard without one, is not fp64, fp32, bf16 or fp16; or the
            quantity cannot be written. The same on every rank.
        FragmentError: a rank could not deliver its shard; the same on every rank.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> shadow = Shadow(model)
    >>> _ = nn.init.constant_(model.weight, 3.0)  # in the place of training steps
    >>> shadow.update(0.75)
    >>> with shadow.swapped():
    ...     model.weight.item()
    1.5
    >>> model.weight.item()
    3.0
    """

    def __init__(
        self,
        params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
        what: str = "value",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._given: Any = params if isinstance(params, nn.Module) else list(params)
        self._what = check_what(what)
        self._model: list[torch.Tensor] | None = None  # the model's shards while swapped
        self._names, shards = self._now("Shadow")
        self._shardings: Sequence[Sharding] = list(shards.shardings)
        self._items: list[int] = []  # of the shards that are not empty here
        self._copies: list[torch.Tensor] = []

        def copy() -> None:
            for item, shard, _ in located(shards):
                kept = dtype or shard.dtype
                if kept not in _AVERAGED or shard.dtype.is_complex or not shard.dtype.is_floating_point:
                    raise InvalidValueError(
                        f"a shadow of {self._names[item]} would average {shard.dtype} as {kept}, expected one of "
                        f"{sorted(map(str, _AVERAGED))}: pass such a dtype, and parameters that are floating-point"
                    )
                self._items.append(item)
                self._copies.append(shard.detach().to(kept, copy=True, memory_format=torch.contiguous_format))

        agree_writable(shards, copy)

    def update(self, decay: float) -> None:
        """Move the shadow towards the quantity: ``shadow.lerp_(value, 1 - decay)``, by one fused call of torch.

        All ranks call it in training, but with ``what="value"`` nothing travels. Optimizer state and gradients are
        compared among ranks that each hold them whole.

        Args:
            decay: how much of the shadow stays, from 0 (the quantity itself) to 1 (nothing changes).

        Raises:
            InvalidValueError: ``decay`` is out of range; or the model has other parameters than the shadow was made
                of, or holds them elsewhere. Each rank tells by itself.
            FragmentError: the shadow is swapped in, or a shard cannot be read.
        """
        if not 0.0 <= decay <= 1.0:
            raise InvalidValueError(f"decay is {decay}, expected a number from 0 to 1")
        self._require(swapped=False, call="update()")
        names, shards = self._now("Shadow.update")
        self._require_same(names, shards)
        values = [shard for _, shard, _ in located(shards)]
        with torch.no_grad():
            pairs = zip(self._copies, values, strict=True)
            cast = [value if value.dtype == copy.dtype else value.to(copy.dtype) for copy, value in pairs]
            if cast:
                torch._foreach_lerp_(self._copies, cast, 1.0 - decay)

    def swap(self) -> None:
        """Exchange the contents of shadow and model. All ranks must call it: one write and one refresh of lp weights.

        Until `restore` the shadow holds the model's shards, in their own dtype, so that they come back bit for bit.

        Raises:
            FragmentError: it is swapped already, or something cannot be written now; the same on every rank, and
                nothing is exchanged.
            InvalidValueError: the model has other parameters than the shadow was made of, or holds them elsewhere.
        """
        self._exchange(swapped=False, call="swap()")

    def restore(self) -> None:
        """Exchange the contents of shadow and model back; as `swap`. All ranks must call it."""
        self._exchange(swapped=True, call="restore()")

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """``with shadow.swapped(): evaluate()``: `swap` before, `restore` after, whatever happens within.

        All ranks must enter and leave it. An exception that only some ranks leave it by has those wait in `restore`
        for the others.
        """
        self.swap()
        try:
            yield
        finally:
            self.restore()

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards by name, and where they are, to resume on the same layout; nothing travels.

        The tensors are the shadow's own, as `nn.Module.state_dict` gives them. Parameters without names are numbered.

        Raises:
            FragmentError: the shadow is swapped in.
        """
        self._require(swapped=False, call="state_dict()")
        shards = {self._names[item]: copy for item, copy in zip(self._items, self._copies, strict=True)}
        layout = {name: _place(sharding) for name, sharding in zip(self._names, self._shardings, strict=True)}
        return {"what": self._what, "layout": layout, "shards": shards}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on the same rank of the same layout. All ranks must call it.

        Raises:
            InvalidValueError: it is of another layout, quantity or model; the same on every rank, and nothing is
                loaded.
            FragmentError: the shadow is swapped in.
        """
        names, shards = self._now("Shadow.load_state_dict")
        found: list[torch.Tensor] = []

        def check() -> None:
            self._require(swapped=False, call="load_state_dict()")
            self._require_same(names, shards)
            found.extend(self._fitting(state))

        _agree(shards, check)
        with torch.no_grad():
            for copy, tensor in zip(self._copies, found, strict=True):
                copy.copy_(tensor)

    @property
    def source(self) -> Any:
        """The module, or the parameters, that the shadow was made of."""
        return self._given

    def locate(self, shards: Shards) -> Locate:
        """What gives the shadow's pieces in the place of the values of ``shards``; for `save_full`.

        Raises:
            InvalidValueError: this is not a shadow of these parameters' values as they are sharded now.
            FragmentError: the shadow is swapped in.
        """
        self._require(swapped=False, call="save_full(values=shadow)")
        if self._what != "value":
            raise InvalidValueError(f"values is a shadow of '{self._what}', expected one of 'value'")
        names, mine = self._now("Shadow.locate")
        self._require_same(names, mine)
        copies = dict(zip(self._items, self._copies, strict=True))
        known = {id(param): copies.get(item) for item, param in enumerate(mine.params)}
        for item, param in enumerate(shards.params):
            if isinstance(param, nn.Parameter) and id(param) not in known:
                raise InvalidValueError(
                    f"values has no shadow of {shards.name(item)}: make the Shadow of the model that is saved"
                )

        def pieces(items: Sequence[int]) -> Found:
            found: list[torch.Tensor | None] = []
            for item in items:
                copy = known.get(id(shards.params[item]))
                if copy is None:  # a buffer, or nothing is here
                    found.append(shards.local(item))
                else:
                    found.append(copy.to(shards.shardings[item].dtype))
            return found

        return pieces

    def _now(self, call: str) -> tuple[list[str], Shards]:
        """The names of the parameters, and where they are now."""
        names, tensors = named(self._given)
        return names or list(map(str, range(len(tensors)))), Shards(tensors, self._what, call)

    def _require(self, *, swapped: bool, call: str) -> None:
        if swapped == (self._model is not None):
            return
        state, fix = ("not swapped in", "swap()") if swapped else ("swapped in", "restore()")
        raise FragmentError(f"{call} of a Shadow that is {state}: call {fix} first")

    def _require_same(self, names: Sequence[str], shards: Shards) -> None:
        if names != self._names:
            other = next((name for name in (*names, *self._names) if (name in names) != (name in self._names)), "")
            raise InvalidValueError(
                f"the model has {len(names)} parameters now, and had {len(self._names)} when its Shadow was made "
                f"(not in both: '{other}'): make a new Shadow"
            )
        if shards.shardings != self._shardings:
            pairs = zip(names, self._shardings, shards.shardings, strict=True)
            name, then, now = next(triple for triple in pairs if triple[1] != triple[2])
            raise InvalidValueError(
                f"'{self._what}' of '{name}' was {_words(then)} when its Shadow was made, and is {_words(now)} now: "
                "make a new Shadow"
            )

    def _exchange(self, *, swapped: bool, call: str) -> None:
        names, shards = self._now(f"Shadow.{call[:-2]}")

        def check() -> None:
            self._require(swapped=swapped, call=call)
            self._require_same(names, shards)

        agree_writable(shards, check)
        model: list[torch.Tensor] = []
        with torch.no_grad(), known_engine():
            for at, (item, shard, through) in enumerate(located(shards)):
                copy = self._copies[at]
                new = copy if self._model is None else self._model[at]
                old = shard.detach().clone()
                if through:
                    shard.copy_(new)
                else:
                    shards.adapters[item].write(shards.params[item], self._what, new.to(shard.dtype))
                if self._model is None:
                    model.append(old)
                    if copy.dtype == old.dtype:
                        self._copies[at] = old.new_empty(0)  # it is in the model now
                elif copy.dtype == old.dtype:
                    self._copies[at] = old
                else:
                    copy.copy_(old)
        self._model = model if self._model is None else None
        refresh_value(shards)

    def _fitting(self, state: Mapping[str, Any]) -> Iterator[torch.Tensor]:
        """The tensors of a state for this rank's copies, if they fit."""
        mine = self.state_dict()
        for key, kind in (("what", str), ("layout", Mapping), ("shards", Mapping)):
            if not isinstance(state.get(key), kind):
                raise InvalidValueError(f"state has no '{key}': pass what Shadow.state_dict() returned")
        if state["what"] != self._what:
            raise InvalidValueError(f"state is of a shadow of '{state['what']}', expected one of '{self._what}'")
        for name in dict.fromkeys((*mine["layout"], *state["layout"])):
            then, now = state["layout"].get(name), mine["layout"].get(name)
            if then != now:
                raise InvalidValueError(
                    f"state does not fit '{name}': it is of {then}, expected {now} (shape, rank, ranks, offset, size); "
                    "load it on the rank and the layout that saved it"
                )
        for name, copy in mine["shards"].items():
            tensor = state["shards"].get(name)
            if not isinstance(tensor, torch.Tensor) or tensor.shape != copy.shape:
                shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise InvalidValueError(f"state has a shard {shape} for '{name}', expected {tuple(copy.shape)}")
            yield tensor


def _agree(shards: Shards, check: Callable[[], None]) -> None:
    error: Exception | None = None
    try:
        check()
    except Exception as caught:
        error = caught
    agree_on(shards, error)


def _place(sharding: Sharding) -> list[Any]:
    """Which part of the parameter is here, in what a checkpoint can hold."""
    rank, fragments = sharding.rank, sharding.layout.fragments
    fragment = fragments[rank]
    box = [[], []] if fragment is None else [list(fragment.offset), list(fragment.size)]
    return [list(sharding.shape), rank, len(fragments), *box]


def _words(sharding: Sharding) -> str:
    return (
        f"{sharding.dtype} of shape {tuple(sharding.shape)} on {sharding.device}, on {len(sharding.layout.fragments)} "
        f"ranks of which this one held {_place(sharding)[3:]}"
    )

"""How adapters are found, and what they share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from ds_fragment import attach, register_adapter, state_keys
from ds_fragment.collective.exchange import Sharding
from ds_fragment.engines import Adapter, adapter_of, adapters, base
from ds_fragment.engines.base import entries_of, state_entry, state_of, value_kind
from ds_fragment.errors import InvalidValueError, StateKeyError, StateNotReadyError, UnlinkedParameterError
from ds_fragment.layout import whole
from ds_fragment.record import note
from ds_fragment.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from fragment_oracle import assert_same
from torch import nn


class Halved(Adapter):
    """An engine of somebody else's: it keeps values elsewhere, at half their size."""

    name = "halved"

    def __init__(self) -> None:
        self.kept: dict[int, torch.Tensor] = {}

    def claims(self, param: torch.Tensor) -> bool:
        return id(param) in self.kept

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        return Sharding(param.shape, torch.float32, param.device, whole(param.shape), None)

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        return self.kept[id(param)]

    def state_keys(self, param: torch.Tensor) -> list[str]:
        return ["half"]

    def master(self, param: torch.Tensor) -> str:
        return "fp32"


@pytest.fixture
def halved() -> Iterator[Halved]:
    adapter = Halved()
    before = list(base._adapters)
    register_adapter(adapter)
    yield adapter
    base._adapters[:] = before


def test_a_registered_adapter_is_asked_first(halved: Halved) -> None:
    mine, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    halved.kept[id(mine)] = torch.full((3,), 0.5)
    assert adapters()[0] is halved
    assert adapter_of(mine) is halved
    assert adapter_of(other).name == "plain"
    assert state_keys(mine) == ["half"]
    assert_same(safe_get_full_fp32_param(mine), torch.full((3,), 0.5))
    safe_set_full_fp32_param(mine, torch.full((3,), 4.0))
    assert_same(halved.kept[id(mine)], torch.full((3,), 4.0))
    assert_same(mine.detach(), torch.ones(3))


def test_an_engine_is_asked_only_about_parameters_that_have_a_mark_of_its_own(halved: Halved) -> None:
    asked: list[int] = []
    halved.claims = lambda param: bool(asked.append(id(param)))  # type: ignore[method-assign, func-returns-value]
    halved.marks = ("_half", "_base", Halved)
    plain, named, none, view, noted = (nn.Parameter(torch.ones(3)) for _ in range(5))
    named._half, none._half = 0, None  # type: ignore[attr-defined]
    note(noted, halved)
    for param in (plain, named, none, view.view(3), noted):
        adapter_of(param)
    assert len(asked) == 4
    assert id(plain) not in asked


@pytest.mark.parametrize("thing", [None, 3, "weight", [torch.ones(2)], nn.Linear(2, 2)])
def test_what_is_no_tensor_is_named(thing: object) -> None:
    with pytest.raises(TypeError, match=f"param is a {type(thing).__name__}, expected a parameter"):
        safe_get_full_fp32_param(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, "upcast"),
        (torch.float16, "upcast"),
        (torch.float8_e5m2, "upcast"),
        (torch.float32, "fp32"),
        (torch.float64, "fp32"),
    ],
)
def test_an_upcast_is_told_from_a_true_master(dtype: torch.dtype, kind: str) -> None:
    param = nn.Parameter(torch.zeros(2, dtype=dtype))
    assert value_kind(dtype) == kind
    assert adapter_of(param).master(param) == kind


def test_state_of_says_what_is_missing() -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(UnlinkedParameterError, match=r"has no optimizer: call attach\(model, optimizer\)"):
        state_of(param, param)
    optimizer = torch.optim.Adagrad([param])
    attach(None, optimizer)
    assert set(state_of(param, param)) == {"step", "sum"}  # made at once by this one
    sgd = torch.optim.SGD([param], momentum=0.9)
    attach(None, sgd)
    with pytest.raises(StateNotReadyError, match="SGD makes it at its first step"):
        state_of(param, param)


def test_states_of_many_are_each_parameters_own_whatever_the_order() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(100)]
    optimizer = torch.optim.Adagrad(params)
    attach(None, optimizer)

    def check() -> None:
        asked = [
            params,
            params[:40],
            params[40:80],
            params[80:],
            params[::-1],
            params[::3],
            params[60:61],
            params[-20:],
        ]
        for some in [*asked, [params[0]] * 20, []]:
            entries = entries_of(some, "sum")
            assert len(entries) == len(some)
            assert all(entry is kept[id(param)] for entry, param in zip(entries, some, strict=True))

    kept = {id(param): optimizer.state[param]["sum"] for param in params}
    check()
    for moved in (params[0], params[50], params[99]):  # to the end
        optimizer.state[moved] = optimizer.state.pop(moved)
        check()
    optimizer.load_state_dict(optimizer.state_dict())  # new tensors
    kept = {id(param): optimizer.state[param]["sum"] for param in params}
    check()
    other = torch.optim.Adagrad(params[:50])  # which now updates those
    attach(None, other)
    kept |= {id(param): other.state[param]["sum"] for param in params[:50]}
    check()
    del optimizer.state[params[70]]
    with pytest.raises(StateNotReadyError):
        entries_of(params, "sum")
    del other, optimizer
    gc.collect()
    with pytest.raises(UnlinkedParameterError):
        entries_of(params, "sum")


def test_state_that_is_a_number_is_read_and_not_silently_lost_when_written() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], momentum=0.9)
    optimizer.state[param].update(step=3, rate=0.5, name="x", nothing=None, momentum_buffer=torch.ones(2))
    attach(None, optimizer)
    assert_same(safe_get_full_optimizer_state(param, "step"), torch.tensor(3))
    assert_same(safe_get_full_optimizer_state(param, "rate"), torch.tensor(0.5))
    with pytest.raises(InvalidValueError, match=r"'step' of .* is a Python number, which cannot be written"):
        safe_set_full_optimizer_state(param, torch.tensor(4.0), "step")
    assert optimizer.state[param]["step"] == 3
    for key, kind in (("name", "str"), ("nothing", "NoneType")):
        with pytest.raises(StateKeyError, match=f"'{key}' of .* is a {kind}, neither a tensor nor a number"):
            safe_get_full_optimizer_state(param, key)


def test_state_entry_lists_what_there_is() -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(StateKeyError, match=r"'nope' is not kept for .* keeps \['a', 'b'\]"):
        state_entry({"b": 1, "a": 2}, param, "nope")


def test_a_step_is_read_and_written() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([param])
    attach(None, optimizer)
    param.grad = torch.ones(2)
    assert_same(safe_get_full_grad(param), torch.ones(2))
    for _ in range(3):
        optimizer.step()
    assert_same(safe_get_full_optimizer_state(param, "step"), torch.tensor(3.0))
    safe_set_full_optimizer_state(param, torch.tensor(10), "step")
    assert_same(optimizer.state[param]["step"], torch.tensor(10.0))

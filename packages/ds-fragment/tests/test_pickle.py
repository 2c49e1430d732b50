"""Fragments and addresses are pickled as DeepSpeed's are, and those in its checkpoints load."""

from __future__ import annotations

import io
import pickle
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from ds_fragment.tensor_fragment import fragment_address, get_hp_fragment_mapping, tensor_fragment

FIELDS = ["lp_fragment", "lp_fragment_address", "hp_fragment", "hp_fragment_address", "gradient_dict"]
FIELDS += ["offload_gradient_dict", "use_offload", "param_group_index", "optim_fragment"]
THEIRS = "deepspeed.utils.tensor_fragment"


def test_an_address() -> None:
    assert pickle.loads(pickle.dumps(fragment_address(3, 5))) == fragment_address(3, 5)


def test_a_fragment() -> None:
    lp, flat = torch.arange(6.0).bfloat16(), torch.arange(4.0)
    fragment = get_hp_fragment_mapping(lp, 2, flat, {0: [flat]}, None, False, 0, 4, 4)
    assert fragment is not None
    fragment.optim_fragment = {"exp_avg": torch.ones(4)}
    assert sorted(fragment.__getstate__()) == sorted(FIELDS)
    back = pickle.loads(pickle.dumps(fragment))
    assert back.lp_fragment.tolist() == [2, 3, 4, 5]
    assert back.hp_fragment.tolist() == [0, 1, 2, 3]
    assert (back.lp_fragment_address, back.hp_fragment_address) == (fragment_address(4, 2), fragment_address(4, 0))
    assert back.get_optim_state_fragment("exp_avg").tolist() == [1] * 4
    assert back.get_lp_grad_fragment(0).tolist() == [0, 1, 2, 3]


@pytest.fixture
def saved_by_deepspeed(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """What torch.save writes of classes with DeepSpeed's names and fields; real ones are in tests-integration."""

    @dataclass
    class Address:
        numel: int
        start: int

    class Fragment:
        def __init__(self, **fields: Any) -> None:
            vars(self).update(fields)

    module = ModuleType(THEIRS)
    for kind, name in ((Address, "fragment_address"), (Fragment, "tensor_fragment")):
        kind.__module__, kind.__qualname__, kind.__name__ = THEIRS, name, name
        setattr(module, name, kind)
    for name in ("deepspeed", "deepspeed.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, THEIRS, module)
    values = dict.fromkeys(FIELDS) | {"lp_fragment": torch.ones(2), "lp_fragment_address": Address(2, 1)}
    file = io.BytesIO()
    torch.save({"address": Address(7, 3), "fragment": Fragment(**values)}, file)
    file.seek(0)
    for name in ("deepspeed", "deepspeed.utils", THEIRS):
        monkeypatch.delitem(sys.modules, name)
    return file


def test_the_lines_of_the_porting_page(saved_by_deepspeed: io.BytesIO) -> None:
    names = [(kind, f"{THEIRS}.{kind.__name__}") for kind in (fragment_address, tensor_fragment)]
    with torch.serialization.safe_globals(names):
        found = torch.load(saved_by_deepspeed, weights_only=True)
    assert found["address"] == fragment_address(7, 3)
    assert type(found["fragment"]) is tensor_fragment
    assert found["fragment"].lp_fragment.tolist() == [1, 1]
    assert found["fragment"].lp_fragment_address == fragment_address(2, 1)

"""Values by tensor: by identity, and weakly."""

from __future__ import annotations

import gc

import torch
from ds_fragment._identity import IdentityMap, Seen
from torch import nn


def test_equal_tensors_are_different_keys() -> None:
    found = IdentityMap[str]()
    one, other = torch.zeros(2), torch.zeros(2)
    found[one] = "one"
    assert found.get(one) == "one"
    assert found.get(other) is None
    assert one in found
    assert other not in found
    found[other] = "other"
    found[one] = "first"
    assert [found.get(one), found.get(other), len(found)] == ["first", "other", 2]
    assert sorted(found.values()) == ["first", "other"]
    assert found.pop(one) == "first"
    assert found.pop(one) is None
    assert list(found.values()) == ["other"]


def test_a_value_goes_with_its_tensor() -> None:
    found = IdentityMap[object]()
    param = nn.Parameter(torch.zeros(3))
    found[param] = object()
    found[param] = object()  # the first entry's reference is gone, and takes nothing with it
    gc.disable()
    try:
        assert len(found) == 1
        del param
        assert len(found) == 0
    finally:
        gc.enable()


def test_another_tensor_at_the_same_address_is_another_key() -> None:
    found = IdentityMap[int]()
    seen = set()
    for turn in range(50):
        tensor = torch.zeros(1)
        assert found.get(tensor) is None
        found[tensor] = turn
        seen.add(id(tensor))
        del tensor
    assert len(seen) < 50, "else the test shows nothing"


def test_tensors_are_the_same_as_long_as_they_live() -> None:
    tensors = [torch.zeros(1), torch.zeros(1)]
    seen = Seen(tensors)
    assert seen.are(tensors)
    assert not seen.are(tensors[::-1])
    assert not seen.are(tensors[:1])
    assert not seen.are([torch.zeros(1), torch.zeros(1)])
    assert seen.alive
    tensors[0] = torch.zeros(1)  # perhaps with the id of the one that goes
    assert not seen.alive
    assert not seen.are(tensors)
    assert Seen().are([])

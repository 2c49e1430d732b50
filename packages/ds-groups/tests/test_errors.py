"""Errors are what callers of `deepspeed.utils.groups` catch."""

from __future__ import annotations

import inspect

import ds_groups
import pytest
from ds_groups import GroupsError, NoSequenceGroupError, NotInitializedError, errors, parallel_state as groups


def test_no_sequence_group_is_a_key_error():
    with pytest.raises(KeyError) as caught:
        groups._get_sequence_parallel_group()
    assert isinstance(caught.value, NoSequenceGroupError)
    assert isinstance(caught.value, NotInitializedError)
    assert str(caught.value).startswith("no sequence parallel group: assign")


def test_every_error_is_exported():
    found = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, GroupsError)}
    assert len(found) >= 13
    assert found <= set(ds_groups.__all__)
    assert all(getattr(ds_groups, name) is getattr(errors, name) for name in found)

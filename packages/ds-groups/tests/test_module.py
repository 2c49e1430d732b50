"""What the module `ds_groups.parallel_state` shows and lets one assign."""

from __future__ import annotations

import pytest
from ds_groups import parallel_state as groups
from ds_groups._variables import DICTS, NAMES


def test_public_names():
    public = {name for name in dir(groups) if not name.startswith("_")}
    assert public == {*groups.__all__, "mpu", "mesh_device", "expert_tensor_parallel_world_size"}
    assert {"_get_data_parallel_group", "_WORLD_GROUP", "__name__", "__file__"} <= set(dir(groups))
    assert all(hasattr(groups, name) for name in dir(groups))


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_s_private_variables_can_be_read(name):
    assert getattr(groups, name) == ({} if name in DICTS else None)
    with pytest.raises(AttributeError):
        setattr(groups, name, None)
    assert name in dir(groups)


def test_dicts_are_the_same_at_every_call():
    assert groups._EXPERT_PARALLEL_GROUP is groups._get_expert_parallel_group_dict()
    assert groups._EXPERT_DATA_PARALLEL_GROUP is groups._get_expert_data_parallel_group_dict()

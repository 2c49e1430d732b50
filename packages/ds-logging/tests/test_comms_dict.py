import copy
import json
import pickle
from types import MappingProxyType

import pytest
from ds_logging.comms_logging import CommsLogger
from ds_logging.errors import ArgumentError, ReadOnlyError


@pytest.fixture
def comms():
    comms = CommsLogger()
    comms.append("all_reduce", "gradients", latency=2.0, msg_size=1024, group_size=2)
    comms.append("all_reduce", "gradients", latency=4.0, msg_size=1024, group_size=2)
    comms.append("broadcast", "weights", latency=1.0, msg_size=4096, group_size=2)
    return comms


def test_it_is_read_as_in_deepspeed(comms):
    assert comms.comms_dict == comms.get_raw_data()
    assert list(comms.comms_dict) == ["gradients", "weights"]
    count, latencies, algorithm, bus = comms.comms_dict["gradients"][1024]
    assert (count, latencies) == (2, [2.0, 4.0])
    assert algorithm == bus  # of two ranks
    for record, sizes in comms.comms_dict.items():
        for size in sizes:
            assert comms.get_operation_summary(record)[size]["count"] == sizes[size][0]


def test_later_operations_do_not_show_in_a_copy(comms):
    before = comms.comms_dict
    comms.append("broadcast", "weights", latency=1.0, msg_size=4096, group_size=2)
    assert before["weights"][4096][0] == 1
    assert comms.comms_dict["weights"][4096][0] == 2


def test_clear_forgets_everything(comms):
    held = comms.comms_dict
    held.clear()
    assert held == comms.comms_dict == {}
    assert not comms.has_data()
    assert comms.get_total_operations() == 0


@pytest.mark.parametrize("empty", [{}, MappingProxyType({})])
def test_assigning_an_empty_mapping_forgets_everything_and_keeps_the_settings(comms, empty):
    comms.verbose = True
    comms.comms_dict = empty
    assert not comms.has_data()
    assert comms.verbose
    comms.append("all_reduce", "again", latency=2.0, msg_size=8, group_size=2)
    assert list(comms.comms_dict) == ["again"]


@pytest.mark.parametrize("value", [{"x": {1: [1, [1.0], [1.0], [1.0]]}}, None, [], 0])
def test_assigning_anything_else_is_refused(comms, value):
    with pytest.raises(ArgumentError, match=r"comms_dict=.*only {} can be assigned") as error:
        comms.comms_dict = value
    assert repr(value) in str(error.value)
    assert comms.get_total_operations() == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.__setitem__("x", {}),
        lambda held: held.__delitem__("weights"),
        lambda held: held.pop("weights"),
        lambda held: held.popitem(),
        lambda held: held.setdefault("x", {}),
        lambda held: held.update(x={}),
        lambda held: held.__ior__({"x": {}}),
    ],
)
def test_a_change_that_would_be_lost_is_refused(comms, change):
    held = comms.comms_dict
    with pytest.raises(ReadOnlyError, match="comms_dict is a copy, a change would be lost"):
        change(held)
    assert held == comms.comms_dict == comms.get_raw_data()
    assert isinstance(ReadOnlyError(), TypeError)


@pytest.mark.parametrize("make", [dict, copy.copy, copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_its_copies_are_plain_dicts(comms, make):
    made = make(comms.comms_dict)
    assert type(made) is dict
    assert made == comms.comms_dict
    made["x"] = {}
    made.clear()
    assert comms.get_total_operations() == 3


def test_it_is_json(comms):
    assert set(json.loads(json.dumps(comms.comms_dict))) == {"gradients", "weights"}

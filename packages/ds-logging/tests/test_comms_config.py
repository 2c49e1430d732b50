from types import SimpleNamespace

import pytest
from ds_logging.comms_logging import CommsLogger
from ds_logging.errors import ArgumentError

SETTINGS = {"enabled": True, "verbose": True, "debug": True, "prof_all": False, "prof_ops": ["all_reduce"]}


def settings_of(comms):
    return {name: getattr(comms, name) for name in SETTINGS}


@pytest.mark.parametrize(
    "config",
    [
        SETTINGS,
        {"comms_logger": SETTINGS, "train_batch_size": 8},
        {"comms_logger": SimpleNamespace(**SETTINGS)},
        SimpleNamespace(**SETTINGS),
        SimpleNamespace(comms_logger_enabled=True, comms_logger=SimpleNamespace(**SETTINGS)),
        SimpleNamespace(comms_logger_enabled=True, comms_logger=SETTINGS),
    ],
    ids=["mapping", "whole", "whole object", "object", "deepspeed", "deepspeed mapping"],
)
def test_all_forms(config):
    comms = CommsLogger()
    comms.configure(config)
    assert settings_of(comms) == SETTINGS


def test_what_is_not_mentioned_stays():
    comms = CommsLogger()
    comms.configure({"prof_ops": ("send", "recv", "send")})
    comms.configure({"enabled": True})
    assert settings_of(comms) == {
        "enabled": True,
        "verbose": False,
        "debug": False,
        "prof_all": True,
        "prof_ops": ["send", "recv"],
    }


def test_deepspeeds_object_without_the_section_disables():
    comms = CommsLogger()
    comms.configure(SETTINGS)
    comms.configure(SimpleNamespace(comms_logger_enabled=False))
    assert settings_of(comms) == {**SETTINGS, "enabled": False}


def test_a_section_that_says_disabled_is_disabled():
    comms = CommsLogger()
    section = SimpleNamespace(**{**SETTINGS, "enabled": False})
    comms.configure(SimpleNamespace(comms_logger_enabled=True, comms_logger=section))
    assert comms.enabled is False


def test_a_section_without_enabled_follows_the_object():
    comms = CommsLogger()
    comms.configure(SimpleNamespace(comms_logger_enabled=True, comms_logger=SimpleNamespace(verbose=True)))
    assert (comms.enabled, comms.verbose) == (True, True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**SETTINGS, "prof": True}, r"unknown settings \['prof'\]"),
        ({**SETTINGS, "verbose": "yes"}, "verbose='yes' is no bool"),
        ({**SETTINGS, "prof_ops": 3}, "prof_ops=3"),
        ({**SETTINGS, "prof_ops": [3]}, r"prof_ops=\[3\]"),
        (3, "comms_config=3 has no setting"),
        ({"comms_logger": 3}, "comms_config=3"),
        (SimpleNamespace(comms_logger_enabled=True), "comms_config=None"),
    ],
)
def test_a_wrong_configuration_changes_nothing(config, words):
    comms = CommsLogger()
    before = settings_of(comms)
    with pytest.raises(ArgumentError, match=words):
        comms.configure(config)
    assert settings_of(comms) == before

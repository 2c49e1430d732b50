"""Reads the settings of the communication log from whatever form they come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ds_logging.errors import ArgumentError

SWITCHES = ("enabled", "verbose", "debug", "prof_all")
OPTIONS = (*SWITCHES, "prof_ops")


def read_options(config: object) -> dict[str, Any]:
    """Return the settings that ``config`` gives, checked; those it does not mention are not in the result.

    Args:
        config: DeepSpeed's configuration object (``comms_logger_enabled`` and ``comms_logger``); an object with the
            settings as attributes; a mapping with the settings; or a whole DeepSpeed configuration, a mapping with the
            key ``"comms_logger"``.

    Raises:
        ArgumentError: it is none of these, has an unknown setting, or a setting of the wrong type.
    """
    if isinstance(config, Mapping):
        nested = config.get("comms_logger")
        return _checked(config if nested is None else _as_mapping(nested))
    if hasattr(config, "comms_logger_enabled"):
        if not config.comms_logger_enabled:
            return {"enabled": False}
        return _checked({"enabled": True, **_as_mapping(getattr(config, "comms_logger", None))})
    return _checked(_as_mapping(config))


def _as_mapping(source: object) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    found = {name: getattr(source, name) for name in OPTIONS if hasattr(source, name)}
    if not found:
        raise ArgumentError(f"comms_config={source!r} has no setting; give some of {', '.join(OPTIONS)}")
    return found


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in given if name not in OPTIONS]
    if unknown:
        raise ArgumentError(f"comms_config has the unknown settings {unknown}; known are {', '.join(OPTIONS)}")
    for name in SWITCHES:
        if name in given and not isinstance(given[name], bool):
            raise ArgumentError(f"comms_config: {name}={given[name]!r} is no bool; give True or False")
    options = dict(given)
    if "prof_ops" in options:
        options["prof_ops"] = operation_names(options["prof_ops"], "comms_config: prof_ops")
    return options


def operation_names(names: Iterable[str], argument: str) -> list[str]:
    """Return names without repetition, in their order. A single string is one name."""
    given = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else None
    if given is None or not all(isinstance(name, str) for name in given):
        raise ArgumentError(f"{argument}={names!r}: give a list of operation names, for example ['all_reduce']")
    return list(dict.fromkeys(given))

"""The names and call signatures of ``deepspeed.utils``, held against the contract of every DeepSpeed committed here.

``contract/deepspeed-VERSION.json`` is made by ``tools/deepspeed_surface.py`` from an installed DeepSpeed. Ours must fit
all versions at once: a name of any of them is here or in `left_out.LEFT_OUT`, and parameters that a later version added
have defaults in the earlier ones' place.
"""

from __future__ import annotations

import doctest
import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ds_train_utils
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import deepspeed_surface as tool  # noqa: E402
from left_out import LEFT_OUT  # noqa: E402

CONTRACT = Path(__file__).parent / "contract"
FILES = {path.stem.partition("-")[2]: path for path in CONTRACT.glob("deepspeed-*.json")}
VERSIONS = sorted(FILES, key=lambda version: [int(part) for part in version.split(".")])
CONTRACTS = {version: json.loads(FILES[version].read_text(encoding="utf-8")) for version in VERSIONS}
MODULES = sorted({module for contract in CONTRACTS.values() for module in contract["modules"]})
# As attributes of the package these two are the class and the function, though modules of the same names exist.
SHADOWING = {"tensor_fragment", "z3_leaf_module"}

# These take DeepSpeed's positional ranks and level in their *args; ds-logging's test_logging.py calls them so.
POSITIONAL_IN_ARGS = ("logging.log_dist", "logging.log_dist_once")
# No parameters of these fit all versions. Ours fit the newest one; from the earlier ones they take every name.
NEWEST_ONLY = {
    "groups._create_expert_and_data_parallel": "after 0.18.9 three parameters came before the last of its two",
    "logging.LoggerFactory.create_logger": "after 0.16.9 the default level is WARNING, not INFO",
}
# The modules of deepspeed.utils whose names the contracts do not hold; timer and zero_to_fp32 are offered here.
OTHER_MODULES = {
    "bwc": "old names of Megatron's mpu, for DeepSpeed's groups",
    "config": "a section of DeepSpeed's configuration file",
    "debug": "names of modules and parameters for ZeRO-3's own debug prints",
    "exceptions": "one exception of DeepSpeed's groups",
    "pin_memory": "memory pinned by DeepSpeed's AIO operator",
    "pin_memory_tracker": "a count of the memory that DeepSpeed pins",
    "static_cache": "a cache of keys and values for generation, of the inference engine",
    "timer": "its names are compared in tests-integration/logging/test_timer.py",
    "torch": "tests of torch's version, for DeepSpeed's own code",
    "types": "enumerations of the inference engine",
    "zero_to_fp32": "a program; its functions are compared in tests-integration/deepspeed/test_zero_checkpoint.py",
    "zero_to_torch": "a program that converts DeepSpeed's checkpoints",
}
# An object of each class whose objects have attributes.
OBJECTS: dict[str, Callable[[], Any]] = {
    "comms_logging.CommsLogger": lambda: found("comms_logging", "CommsLogger")(),
    "dataloader.RepeatingLoader": lambda: found("dataloader", "RepeatingLoader")([1]),
    "init_on_device.OnDevice": lambda: found("init_on_device", "OnDevice")(torch.float16),
}

every_version = pytest.mark.parametrize("version", VERSIONS)


def found(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"ds_train_utils.{module}"), name)


def has(module: str, name: str) -> bool:
    try:
        found(module, name)
    except (ImportError, AttributeError):
        return False
    return True


def entries(version: str, kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(module, name, entry) of what is of this kind and not left out."""
    return [
        (module, name, entry)
        for module, names in CONTRACTS[version]["modules"].items()
        for name, entry in names.items()
        if entry["kind"] == kind and f"{module}.{name}" not in LEFT_OUT
    ]


def missing(version: str, kind: str) -> list[str]:
    return [f"missing: {module}.{name}" for module, name, _ in entries(version, kind) if not has(module, name)]


def present(version: str, kind: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """(full name, our value, entry) of what is of this kind and not missing."""
    return [
        (f"{module}.{name}", found(module, name), entry)
        for module, name, entry in entries(version, kind)
        if has(module, name)
    ]


def all_parameters(full: str) -> list[list[str]]:
    """The parameters that a function, or a method, has in each version that has it."""
    module, name, *member = full.split(".")
    known = [contract["modules"].get(module, {}).get(name) for contract in CONTRACTS.values()]
    if member:
        return [entry["members"][member[0]] for entry in known if entry and member[0] in entry["members"]]
    return [entry["parameters"] for entry in known if entry]


def fits(theirs: list[str], ours: list[str], known: list[list[str]]) -> bool:
    """Whether a function with our parameters can be called as theirs.

    Ours begin with theirs, in the same order and with the same defaults. More may follow if they have defaults:
    keyword-only ones, and positional ones as in another version, one of ``known``.
    """
    mine, wanted = named(ours), named(theirs)
    taken = all(name in mine and ("=" not in text or mine[name] == text) for name, text in wanted.items())
    optional = all("=" in text for name, text in mine.items() if name not in wanted)
    begins = positional(ours)[: len(positional(theirs))] == positional(theirs)
    return taken and optional and begins and positional(ours) in [positional(other) for other in known]


def named(parameters: list[str]) -> dict[str, str]:
    """Parameters, with their defaults, by name."""
    return {text.partition("=")[0]: text for text in parameters if text not in {"*", "/"}}


def positional(parameters: list[str]) -> list[str]:
    """The names of all parameters but the keyword-only ones."""
    stars = [index for index, text in enumerate(parameters) if text == "*" or (text[0] == "*" and text[1] != "*")]
    until = stars[0] + 1 if stars else len(parameters)
    kept = [*parameters[:until], *(text for text in parameters[until:] if text.startswith("**"))]
    return list(named(kept))


def changes(full: str, theirs: list[str], function: Any) -> list[str]:
    """The line about a function that cannot be called as theirs, if it cannot."""
    ours = tool.parameters(function)
    known = all_parameters(full)
    if full in POSITIONAL_IN_ARGS and "*args" in ours:
        mine = named(ours)
        fit = all("=" not in text or mine.get(name) == text for name, text in named(theirs).items())
    elif full in NEWEST_ONLY and theirs != known[-1]:
        fit = set(named(theirs)) <= set(named(ours))
    else:
        fit = fits(theirs, ours, known)
    if fit:
        return []
    return [f"changed: {full}: theirs ({', '.join(theirs)}), ours ({', '.join(ours)})"]


def class_changes(full: str, cls: Any, entry: dict[str, Any]) -> list[str]:
    """A line about each member, field or attribute that the class lacks or has otherwise."""
    if not isinstance(cls, type):
        return [f"changed: {full}: theirs is a class, ours {type(cls).__name__}"]
    lines = []
    for member, wanted in entry["members"].items():
        if not hasattr(cls, member):
            lines.append(f"missing: {full}.{member}")
        elif isinstance(wanted, list):
            lines += changes(f"{full}.{member}", wanted, getattr(cls, member))
    fields = entry.get("fields", [])
    ours = tool.parameters(cls)[: len(fields)] if fields else []
    if ours != fields:
        lines.append(f"changed: {full}: theirs has the fields ({', '.join(fields)}), ours ({', '.join(ours)})")
    attributes = entry.get("attributes", [])
    if attributes:
        example = OBJECTS[full]()
        lines += [f"missing: {full}.{name}" for name in attributes if not hasattr(example, name)]
    return [line for line in lines if line.removeprefix("missing: ") not in LEFT_OUT]


def report(lines: list[str]) -> None:
    """Fail with these lines, if there are any."""
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@every_version
def test_every_kind_of_entry_is_checked(version: str) -> None:
    kinds = {entry["kind"] for names in CONTRACTS[version]["modules"].values() for entry in names.values()}
    assert kinds <= {"function", "class", "logger", "flag", "constant", "module state"}


@every_version
def test_namespace(version: str) -> None:
    lines = []
    for name in CONTRACTS[version]["namespace"]:
        if name not in ds_train_utils.__all__ or name not in dir(ds_train_utils):
            lines.append(f"missing: namespace.{name}")
            continue
        value = getattr(ds_train_utils, name)
        homes = [module for module, names in CONTRACTS[version]["modules"].items() if name in names]
        wanted = [found(home, name) for home in homes] or [importlib.import_module(f"ds_train_utils.{name}")]
        if not all(value is one for one in wanted):
            lines.append(f"changed: namespace.{name}: is not that of {', '.join(homes) or 'the module'}")
    report(lines)


@every_version
def test_functions(version: str) -> None:
    lines = missing(version, "function")
    for full, function, entry in present(version, "function"):
        lines += changes(full, entry["parameters"], function)
    report(lines)


@pytest.mark.parametrize("full", POSITIONAL_IN_ARGS)
def test_what_takes_positional_parameters_in_args_takes_them(full: str, caplog: pytest.LogCaptureFixture) -> None:
    for theirs in all_parameters(full):
        assert positional(theirs) == ["message", "ranks", "level"]
    function = found(*full.split("."))
    for number, arguments in enumerate([([0], 50), ([0, 1], 40), ([1], 50), (None, 40)]):
        function(f"{full} {number}", *arguments)
    function(f"100% {full}", [0], 50)
    assert [(record.getMessage(), record.levelno) for record in caplog.records] == [
        (f"[Rank 0] {full} 0", 50),
        (f"[Rank 0] {full} 1", 40),
        (f"[Rank 0] {full} 3", 40),
        (f"[Rank 0] 100% {full}", 50),
    ]


@every_version
def test_classes(version: str) -> None:
    lines = missing(version, "class")
    for full, cls, entry in present(version, "class"):
        lines += class_changes(full, cls, entry)
    report(lines)


@every_version
def test_loggers(version: str) -> None:
    lines = missing(version, "logger")
    for full, logger, entry in present(version, "logger"):
        assert isinstance(logger, logging.Logger), full
        lines += [f"missing: {full}.{member}" for member in entry["members"] if not hasattr(logger, member)]
    report(lines)


@every_version
def test_flags_and_constants(version: str) -> None:
    lines = missing(version, "flag") + missing(version, "constant")
    for full, value, entry in present(version, "flag") + present(version, "constant"):
        if tool.text(value) != entry.get("value", tool.text(value)):  # private ones are listed without their value
            lines.append(f"changed: {full}: theirs {entry['value']}, ours {tool.text(value)}")
        if type(value).__name__ != entry.get("type", type(value).__name__):
            lines.append(f"changed: {full}: theirs is a {entry['type']}, ours a {type(value).__name__}")
    report(lines)


@every_version
def test_module_state(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it can be read. What is public, or used by DeepSpeed's own code, can be assigned, too."""
    lines = missing(version, "module state")
    for full, _, entry in present(version, "module state") + present(version, "flag"):
        module, _, name = full.partition(".")
        if name.startswith("_") and not entry.get("used"):
            continue
        home = importlib.import_module(f"ds_train_utils.{module}")
        marker = object()
        with monkeypatch.context() as patch:
            try:
                patch.setattr(home, name, marker)
            except Exception as error:
                lines.append(f"changed: {full}: cannot be assigned: {error}")
                continue
            if found(module, name) is not marker or vars(sys.modules[home.__name__])[name] is not marker:
                lines.append(f"changed: {full}: is not what was assigned to it")
    report(lines)


@pytest.mark.parametrize("full", LEFT_OUT)
def test_what_is_left_out_is_in_a_contract_and_missing(full: str) -> None:
    assert any(full in tool.flatten(contract) for contract in CONTRACTS.values())
    module, name, *member = full.split(".")
    if member:
        assert not hasattr(OBJECTS[f"{module}.{name}"](), member[0])
    else:
        assert not has(module, name)
        assert not any(contract["modules"].get(module, {}).get(name, {}).get("used") for contract in CONTRACTS.values())
    assert LEFT_OUT[full]


@pytest.mark.parametrize("full", NEWEST_ONLY)
def test_what_is_excepted_from_earlier_versions_does_not_fit_them(full: str) -> None:
    known = all_parameters(full)
    assert not all(fits(theirs, known[-1], known) for theirs in known)
    assert NEWEST_ONLY[full]


def test_the_modules_that_are_not_offered_are_listed() -> None:
    assert {name for contract in CONTRACTS.values() for name in contract["other_modules"]} == set(OTHER_MODULES)


def installed(tmp_path: Path) -> dict[str, Any]:
    """The contract of the DeepSpeed of this environment, made now."""
    output = tmp_path / "installed.json"
    command = [sys.executable, str(ROOT / "tools" / "deepspeed_surface.py"), "--output", str(output)]
    environment = {"DS_ACCELERATOR": "cpu", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    contract: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return contract


def compare_with_committed(contract: dict[str, Any], committed: dict[str, dict[str, Any]]) -> None:
    """Fail where the contract is not the committed one of its version."""
    version = contract["version"]
    if version not in committed:
        path = f"tests-integration/contract/deepspeed-{version}.json"
        report([f"no contract of DeepSpeed {version} is committed: python tools/deepspeed_surface.py --output {path}"])
    report(tool.differences(committed[version], contract))
    assert contract == committed[version]


def test_the_installed_deepspeed_is_the_committed_one(tmp_path: Path) -> None:
    compare_with_committed(installed(tmp_path), CONTRACTS)


def test_a_version_without_contract_says_how_to_make_it() -> None:
    command = "tools/deepspeed_surface.py --output tests-integration/contract/deepspeed-9.9.9.json"
    with pytest.raises(pytest.fail.Exception, match=command):
        compare_with_committed({**CONTRACTS[VERSIONS[-1]], "version": "9.9.9"}, CONTRACTS)


@every_version
def test_a_file_is_named_for_its_version_and_written_by_the_tool(version: str) -> None:
    assert CONTRACTS[version]["version"] == version
    assert FILES[version].read_text(encoding="utf-8") == tool.written(CONTRACTS[version]) + "\n"


def test_the_examples_of_the_tool() -> None:
    result = doctest.testmod(tool)
    assert (result.failed, result.attempted >= 5) == (0, True)


SMALL: dict[str, Any] = {
    "namespace": ["f"],
    "modules": {
        "m": {
            "f": {"kind": "function", "parameters": ["a", "b=1"]},
            "C": {"kind": "class", "members": {"do": ["self"]}, "fields": ["x"], "attributes": ["y"]},
        }
    },
}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda m: None, []),
        (
            lambda m: m["f"]["parameters"].append("c=None"),
            ["changed: m.f: committed (a, b=1), installed (a, b=1, c=None)"],
        ),
        (lambda m: m["f"].update(parameters=["a", "b=2"]), ["changed: m.f: committed (a, b=1), installed (a, b=2)"]),
        (lambda m: m.pop("f"), ["missing: m.f: (a, b=1)"]),
        (lambda m: m.update(g={"kind": "module state"}), ["new: m.g: module state"]),
        (
            lambda m: m["f"].update(used=True),
            ["changed: m.f: committed (a, b=1), installed (a, b=1), used by DeepSpeed"],
        ),
        (
            lambda m: m["C"]["members"].update(do=["self", "n"]),
            ["changed: m.C.do: committed (self), installed (self, n)"],
        ),
        (lambda m: m["C"]["members"].pop("do"), ["missing: m.C.do: (self)"]),
        (lambda m: m["C"].update(fields=["x=0"]), ["changed: m.C: committed class of (x), installed class of (x=0)"]),
        (lambda m: m["C"].update(attributes=["z"]), ["missing: m.C.y: attribute", "new: m.C.z: attribute"]),
    ],
)
def test_differences_are_named(change: Callable[[dict[str, Any]], object], lines: list[str]) -> None:
    after = json.loads(json.dumps(SMALL))
    change(after["modules"]["m"])
    assert tool.differences(SMALL, after) == lines


def test_differences_of_the_namespace_are_named() -> None:
    assert tool.differences(SMALL, {**SMALL, "namespace": []}) == ["missing: namespace.f: offered"]


@pytest.mark.parametrize(
    ("theirs", "ours", "fit"),
    [
        (["a", "b=1"], ["a", "b=1"], True),
        (["a", "b=1"], ["a", "b=1", "*", "c=2"], True),
        (["a"], ["a=None"], True),  # a decorator that can be used without arguments
        (["*args", "**kwargs"], ["*args", "**kwargs"], True),
        (["a", "b=1"], ["a", "b=1", "c=None"], True),  # as a later version has it
        (["a", "b=1"], ["a", "b=1", "d=None"], False),  # which no version has
        (["a", "b=1"], ["a", "b=1", "c"], False),
        (["a", "b=1"], ["a", "b=1", "*", "c"], False),
        (["a", "b=1"], ["a", "b=2"], False),
        (["a", "b=1"], ["a", "b"], False),
        (["a", "b=1"], ["a"], False),
        (["a", "b=1"], ["a", "*", "b=1"], False),
        (["a", "b=1"], ["b=1", "a"], False),
        (["a", "b=1"], ["a", "b=1", "**kwargs"], False),
        (["*args", "**kwargs"], ["*args"], False),
    ],
)
def test_which_parameters_fit(theirs: list[str], ours: list[str], fit: bool) -> None:
    assert fits(theirs, ours, [theirs, ["a", "b=1", "c=None"]]) is fit


def test_a_change_of_ours_is_named() -> None:
    full = "logging.log_dist"
    (line,) = changes(full, ["message", "ranks=[0]"], lambda message, ranks=None: None)
    assert line == f"changed: {full}: theirs (message, ranks=[0]), ours (message, ranks=None)"


def test_fragment_address_has_its_fields() -> None:
    address = found("tensor_fragment", "fragment_address")(7, 3)
    assert (address.numel, address.start) == (7, 3)


class FakeMpu:
    """The part of Megatron's model-parallel unit that is asked here."""

    def get_data_parallel_world_size(self) -> int:
        return 12

    def get_data_parallel_group(self) -> str:
        return "the group of mpu"


def test_groups_sees_an_assigned_mpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_train_utils.groups import _get_data_parallel_group, _get_data_parallel_world_size

    monkeypatch.setattr(ds_train_utils.groups, "mpu", FakeMpu())
    assert (_get_data_parallel_world_size(), _get_data_parallel_group()) == (12, "the group of mpu")


def test_calls_with_the_flag_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @ds_train_utils.instrument_w_nvtx
    def double(x: int) -> int:
        return 2 * x

    for flag in (False, True):
        monkeypatch.setattr(ds_train_utils.nvtx, "enable_nvtx", flag)
        assert double(21) == 42


@pytest.mark.parametrize("name", sorted(SHADOWING))
def test_shadowing(name: str) -> None:
    module = importlib.import_module(f"ds_train_utils.{name}")
    assert isinstance(module, ModuleType)
    attribute = getattr(ds_train_utils, name)
    assert not isinstance(attribute, ModuleType)
    assert attribute is getattr(module, name)
    namespace: dict[str, Any] = {}
    exec(
        f"from ds_train_utils import {name} as attribute\nfrom ds_train_utils.{name} import {name} as inner", namespace
    )
    assert namespace["attribute"] is namespace["inner"] is attribute


@pytest.mark.parametrize("name", sorted(set(MODULES) - SHADOWING))
def test_submodule_is_an_attribute_too(name: str) -> None:
    assert getattr(ds_train_utils, name) is importlib.import_module(f"ds_train_utils.{name}")


def test_parallel_state_is_the_groups_module() -> None:
    import ds_groups.parallel_state

    assert ds_train_utils.groups is ds_groups.parallel_state

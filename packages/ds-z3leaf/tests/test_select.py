from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from ds_z3leaf import select_modules
from ds_z3leaf.errors import LeafNotFoundError, LeafTypeError, LeafValueError
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

Kinds = dict[str, type[nn.Module]]
MLPS = [f"layers.{i}.mlp" for i in range(12)]


def names(model: nn.Module, **selectors: Any) -> list[str]:
    return list(select_modules(model, **selectors).modules)


def test_a_class_matches_its_subclasses(net: nn.Module, kinds: Kinds) -> None:
    assert names(net, classes=kinds["MoeBlock"]) == MLPS
    assert names(net, classes=[kinds["SparseBlock"]]) == MLPS[11:]


def test_the_name_of_a_class_matches_subclasses_too(net: nn.Module, kinds: Kinds) -> None:
    full = f"{kinds['MoeBlock'].__module__}.MoeBlock"
    assert names(net, classes="MoeBlock") == names(net, classes=[full]) == MLPS
    assert names(net, classes="SparseBlock") == MLPS[11:]
    assert names(net, classes="torch.nn.modules.container.ModuleList")[0] == "layers"


def test_names_are_whole(net: nn.Module) -> None:
    assert names(net, names=["layers.3.mlp", "head"]) == ["layers.3.mlp", "head"]
    with pytest.raises(LeafNotFoundError, match=r"name 'mlp'"):
        names(net, names="mlp")


def test_a_suffix_is_made_of_whole_parts(net: nn.Module) -> None:
    assert names(net, suffixes="1.mlp") == ["layers.1.mlp"]
    assert names(net, suffixes="mlp") == names(net, suffixes=".mlp") == MLPS
    assert names(net, suffixes="head") == ["head"]
    with pytest.raises(LeafNotFoundError, match=r"suffix 'lp'"):
        names(net, suffixes="lp")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*.mlp", MLPS),
        ("**.mlp", MLPS),
        ("layers.1?.mlp", MLPS[10:]),
        ("layers.[0-1].mlp", MLPS[:2]),
        ("layers.2.**.up", [f"layers.2.mlp.experts.{i}.up" for i in range(3)]),
        ("**.mlp.**.0", [f"layers.{i}.mlp.experts.0" for i in range(12)]),
        ("head.**", ["head"]),
        ("*", ["layers", "head"]),
    ],
)
def test_globs(net: nn.Module, pattern: str, expected: list[str]) -> None:
    assert names(net, globs=pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"layers\.\d\.mlp", MLPS[:10]),
        (re.compile(r"LAYERS\.1\d\.MLP", re.I), MLPS[10:]),
        ([r".*\.1\.mlp", "head|tail"], ["layers.1.mlp", "head"]),
        (r"layers\.(?!1).*mlp", [name for name in MLPS if not name.startswith("layers.1")]),
    ],
)
def test_regular_expressions_match_from_end_to_end(net: nn.Module, pattern: Any, expected: list[str]) -> None:
    assert names(net, regexes=pattern) == expected


def test_globs_with_sets_match_one_part() -> None:
    model = nn.ModuleDict({"a-1": nn.ModuleDict({"b]": nn.Identity(), "[": nn.Identity()}), "^": nn.Identity()})
    assert names(model, globs="a[!x]1.*") == ["a-1.b]", "a-1.["]
    assert names(model, globs="a[+-/]1") == ["a-1"]
    assert names(model, globs="*.[[]") == ["a-1.["]
    assert names(model, globs=["[^a]", "*.b[]]"]) == ["a-1.b]", "^"]


def test_a_model_that_holds_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model.append(model)
    with pytest.raises(LeafValueError, match="Sequential holds a module that holds itself"):
        names(model, names="0")


def test_a_predicate_sees_names_and_modules(net: nn.Module) -> None:
    assert names(net, where=lambda name, module: name.startswith("layers.2") and hasattr(module, "gate")) == [
        "layers.2.mlp"
    ]


def test_modules_themselves(net: nn.Module) -> None:
    layers: Any = net.layers
    assert names(net, modules=layers[4].mlp) == ["layers.4.mlp"]
    assert names(net, modules=[layers[5], net]) == ["", "layers.5"]
    assert names(net, modules=layers) == ["layers"]  # a list of modules is a module


def test_selectors_add_up_and_each_module_counts_once(net: nn.Module) -> None:
    found = names(net, suffixes=["mlp", "3.mlp"], names="head", classes="SparseBlock", globs="layers.3.*")
    assert found == [*MLPS[:3], "layers.3.attention", *MLPS[3:], "head"]


def test_a_module_registered_twice_is_found_by_either_name() -> None:
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert names(model, names="b") == ["b"]
    assert names(model, names=["a", "b"]) == ["a"]


def test_wrappers_do_not_hide_names(net: nn.Module) -> None:
    layers: Any = net.layers
    layers[0].mlp = torch.compile(layers[0].mlp, backend="eager")
    layers[1].mlp = checkpoint_wrapper(layers[1].mlp)
    assert names(net, suffixes="mlp") == MLPS  # the wrappers, once each
    assert names(net, names="layers.0.mlp.gate") == ["layers.0.mlp._orig_mod.gate"]
    assert names(net, globs="layers.*.mlp.gate")[1] == "layers.1.mlp._checkpoint_wrapped_module.gate"
    assert names(net, names="layers.1.mlp._checkpoint_wrapped_module.gate") != []


def test_every_selector_that_misses_is_reported_though_others_match(net: nn.Module) -> None:
    with pytest.raises(LeafNotFoundError) as caught:
        select_modules(
            net,
            classes=["MoeBlock", "MoeBlok", nn.Conv2d],
            names="layers.2.mpl",
            suffixes=["mlp", "attentions"],
            globs="blocks.*",
            regexes="mlp",
            where=lambda name, module: False,
            modules=nn.Linear(1, 1),
        )
    text = str(caught.value)
    assert text.startswith("8 of 10 selectors match nothing in Net: ")
    for part in (
        "class 'MoeBlok' (near: 'MoeBlock'",
        "class 'Conv2d'",
        "name 'layers.2.mpl' (near: 'layers.2.mlp'",
        "suffix 'attentions' (near: 'attention')",
        "glob 'blocks.*'",
        "regex 'mlp' (near: '.*mlp')",
        "where ",
        "module of class 'Linear'",
    ):
        assert part in text


def test_what_misses_can_be_asked_for_instead(net: nn.Module) -> None:
    found = select_modules(net, names=["head", "tail"], classes=nn.Conv2d, raise_if_not_found=False)
    assert list(found.modules) == ["head"]
    assert found.missing == ("class 'Conv2d'", "name 'tail'")
    assert found.missing_values == (nn.Conv2d, "tail")


def test_near_names_ignore_case(net: nn.Module) -> None:
    with pytest.raises(LeafNotFoundError, match="near: 'MoeBlock'"):
        select_modules(net, classes="MOEBLOCK")


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ({"names": "layers.40.mpl"}, "'layers.11.mlp'"),
        ({"names": "model.layers.7.mlp.gat"}, "'layers.7.mlp.gate'"),
        ({"names": "layers.7.mlp.exprts.2.up"}, "'layers.7.mlp.experts.2.up'"),
        ({"suffixes": "exprts.2.up"}, "'experts.2.up'"),
        ({"suffixes": "mlp.expert.9"}, "'mlp.experts.2'"),
        ({"globs": "layers.*.mpl"}, "'layers.*.mlp'"),
        ({"globs": "layers.[0-3].mpl"}, "'layers.[0-3].mlp'"),
        ({"globs": "**.exprts.*"}, "'**.experts.*'"),
        ({"regexes": r"layers\.\d+\.mpl"}, "'layers.0.mlp'"),
        ({"regexes": r".*\.gat"}, "'layers.0.mlp.gate'"),
        ({"regexes": "layers.1.ml"}, "'layers.0.mlp'"),
    ],
)
def test_near_names_keep_the_numbers(net: nn.Module, selector: dict[str, Any], near: str) -> None:
    with pytest.raises(LeafNotFoundError) as caught:
        select_modules(net, **selector)
    assert f"(near: {near}" in str(caught.value), str(caught.value)


def test_near_names_take_no_time_in_a_large_model() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(*(nn.Linear(1, 1) for _ in range(20))) for _ in range(300)))
    wrong = {
        "names": [f"1.{i}x" for i in range(4)],
        "suffixes": [f"{i}.y" for i in range(4)],
        "globs": [f"*.{i}z" for i in range(4)],
        "regexes": [rf"\d+\.{i}z" for i in range(4)],
    }
    began = time.process_time()
    for argument, values in wrong.items():
        with pytest.raises(LeafNotFoundError):
            select_modules(model, **{argument: values})
    assert time.process_time() - began < 1.0  # 0.1 s; comparing with every name takes ten


def test_an_error_stays_short_however_large_the_model() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1)) for _ in range(300)))
    with pytest.raises(LeafNotFoundError) as caught:
        select_modules(model, names=[f"blocks.{i}" for i in range(500)], suffixes="x" * 20)
    text = str(caught.value)
    assert "501 of 501 selectors match nothing in Sequential" in text
    assert "and 493 more" in text
    assert "\n" not in text
    assert len(text) < 1500
    assert "in_features" not in text


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"suffixes": ""}, "suffixes holds '', which names nothing"),
        ({"suffixes": ["mlp", "."]}, r"suffixes holds '\.', which names nothing"),
        ({"names": [""]}, "names holds '', which names nothing"),
        ({"globs": " "}, "globs holds ' ', which names nothing"),
        ({"globs": "**"}, r"globs holds '\*\*', which every name matches"),
        ({"classes": ""}, "classes holds '', which names nothing"),
        ({"classes": nn.Module}, "classes holds torch.nn.Module, which every module is"),
        ({"regexes": ""}, "regexes holds '', which names nothing"),
        ({"regexes": "(mlp"}, r"regexes holds '\(mlp', which is no regular expression: missing \), unterminated"),
        ({"regexes": ".*"}, r"regexes holds '\.\*', which matches the empty name"),
        ({"regexes": [".+"]}, r"regexes holds '\.\+', which every name matches"),
        ({"regexes": r"layers.*|head"}, "which every name matches"),
        ({"classes": "Module"}, "classes holds 'Module', which every module is"),
        ({}, "no selector is given"),
        ({"names": [], "classes": ()}, "no selector is given"),
    ],
)
def test_what_would_choose_everything_or_nothing(net: nn.Module, selectors: dict[str, Any], message: str) -> None:
    with pytest.raises(LeafValueError, match=message):
        select_modules(net, **selectors)


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"classes": 3}, "classes is a int: pass classes or their names"),
        ({"classes": [dict]}, "classes holds dict, which is no torch.nn.Module"),
        ({"classes": [nn.Linear(1, 1)]}, "classes holds a Linear"),
        ({"names": [nn.Linear]}, "names holds a type: pass strings"),
        ({"suffixes": 1}, "suffixes is a int"),
        ({"regexes": 3}, "regexes is a int: pass strings or compiled patterns"),
        ({"regexes": b"mlp"}, "regexes is a bytes"),
        ({"regexes": re.compile(b"mlp")}, "regexes holds a pattern of bytes"),
        ({"globs": None}, "globs is a NoneType"),
        ({"where": "mlp"}, "where is a str: pass a function"),
        ({"modules": ["mlp"]}, "modules holds a str"),
        ({"modules": "mlp"}, "modules is a str"),
    ],
)
def test_wrong_types(net: nn.Module, selectors: dict[str, Any], message: str) -> None:
    with pytest.raises(LeafTypeError, match=message):
        select_modules(net, **selectors)


def test_a_model_is_a_module() -> None:
    with pytest.raises(LeafTypeError, match=r"model is a dict: pass a torch\.nn\.Module"):
        select_modules({}, names="a")  # type: ignore[arg-type]


def test_errors_are_those_that_callers_of_deepspeed_catch(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        select_modules(net, names="x")
    with pytest.raises(TypeError):
        select_modules(net, names=3)  # type: ignore[arg-type]

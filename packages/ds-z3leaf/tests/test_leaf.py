from __future__ import annotations

import copy
import inspect
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import ds_z3leaf
import pytest
import torch
from ds_z3leaf import find_leaf_candidates, fully_shard_leaves, leaf, plan_leaves
from ds_z3leaf.errors import LeafNotFoundError, LeafTypeError, LeafValueError
from ds_z3leaf.leaf import (
    apply_zero_leaf_module_config,
    get_z3_leaf_modules,
    mark_leaves,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
    z3_leaves,
)
from torch import nn

Kinds = dict[str, type[nn.Module]]


def state(model: nn.Module) -> dict[str, Any]:
    """Every flag in a model, read the way DeepSpeed reads them."""
    owners = {
        name: param.ds_z3_leaf_module for name, param in model.named_parameters() if hasattr(param, "ds_z3_leaf_module")
    }
    flags = {name: module._z3_leaf for name, module in model.named_modules() if hasattr(module, "_z3_leaf")}
    return {"owners": owners, "flags": flags}


CLEAN = {"owners": {}, "flags": {}}


def test_signatures_are_deepspeeds() -> None:
    expected = {
        "z3_leaf_module": "model",
        "z3_leaf_parameter": "model",
        "get_z3_leaf_modules": "model",
        "set_z3_leaf_module": "model, flag",
        "set_z3_leaf_modules_by_name": "model, module_names, flag=True, raise_if_not_found=True",
        "set_z3_leaf_modules_by_suffix": "model, module_name_suffixes, flag=True, raise_if_not_found=True",
        "set_z3_leaf_modules": "model, leaf_module_classes, raise_if_not_found=True",
        "unset_z3_leaf_modules": "model, leaf_module_classes, raise_if_not_found=True",
        "apply_zero_leaf_module_config": "model, leaf_cfg",
    }
    for name, parameters in expected.items():
        found = inspect.signature(getattr(leaf, name)).parameters.values()
        shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in found if p.kind != p.KEYWORD_ONLY]
        assert ", ".join(shown) == parameters
        assert getattr(ds_z3leaf, name) is getattr(leaf, name)


def test_both_flags_are_set_and_taken_away(net: nn.Module) -> None:
    assert not z3_leaf_module(net.layers[0].mlp)
    assert not z3_leaf_parameter(net.head.weight)
    found = set_z3_leaf_modules(net, ["MoeBlock"])
    blocks = [layer.mlp for layer in net.layers]
    assert found == blocks == get_z3_leaf_modules(net)
    marked = state(net)
    assert marked["flags"] == {f"layers.{i}.mlp": True for i in range(12)}
    assert set(marked["owners"]) == {name for name, _ in net.named_parameters() if ".mlp." in name}
    assert marked["owners"]["layers.7.mlp.experts.1.up.bias"] is blocks[7]
    assert z3_leaf_module(blocks[0])
    assert z3_leaf_parameter(blocks[0].gate.weight)
    assert unset_z3_leaf_modules(net, ["MoeBlock"]) == blocks
    assert state(net) == CLEAN
    assert get_z3_leaf_modules(net) == []


def test_by_name_and_suffix(net: nn.Module) -> None:
    assert set_z3_leaf_modules_by_name(net, ["layers.1.mlp"]) == ([net.layers[1].mlp], [])
    assert set_z3_leaf_modules_by_suffix(net, ["1.mlp"]) == ([net.layers[1].mlp], [])
    assert not z3_leaf_module(net.layers[11].mlp)
    assert set_z3_leaf_modules_by_name(net, ["layers.1.mlp"], False) == ([net.layers[1].mlp], [])
    assert state(net) == CLEAN
    set_z3_leaf_modules_by_suffix(net, ["mlp"])
    set_z3_leaf_modules_by_suffix(net, ["mlp"], flag=False)
    assert state(net) == CLEAN
    assert set_z3_leaf_modules_by_name(net, []) == set_z3_leaf_modules_by_suffix(net, []) == ([], [])


def test_instances_may_stand_among_classes(net: nn.Module, kinds: Kinds) -> None:
    assert set_z3_leaf_modules(net, [net.layers[2].mlp, kinds["SparseBlock"]]) == [
        net.layers[2].mlp,
        net.layers[11].mlp,
    ]


def test_one_class_need_not_be_in_a_list(net: nn.Module, kinds: Kinds) -> None:
    assert len(set_z3_leaf_modules(net, kinds["MoeBlock"])) == 12
    assert len(unset_z3_leaf_modules(net, "MoeBlock")) == 12


@pytest.mark.parametrize(
    "call",
    [
        lambda net: set_z3_leaf_modules(net, ["MoeBlock", "Absent"]),
        lambda net: set_z3_leaf_modules(net, ["MoeBlock", 3]),
        lambda net: set_z3_leaf_modules(net, ["MoeBlock", nn.Module]),
        lambda net: set_z3_leaf_modules(net, [net.head, nn.Linear(1, 1)]),
        lambda net: set_z3_leaf_modules(net, []),
        lambda net: set_z3_leaf_modules_by_name(net, ["head", "tail"]),
        lambda net: set_z3_leaf_modules_by_name(net, ["head", ""]),
        lambda net: set_z3_leaf_modules_by_name(net, None),
        lambda net: set_z3_leaf_modules_by_suffix(net, ["mlp", ""], raise_if_not_found=False),
        lambda net: mark_leaves(net, suffixes="mlp", globs="absent.*"),
        lambda net: mark_leaves(net, suffixes="mlp", where=lambda name, module: 1 / 0),
        lambda net: apply_zero_leaf_module_config(net, {"names": ["head"], "name_suffixes": [""]}),
        lambda net: apply_zero_leaf_module_config(net, {"names": ["head"], "classes": [nn.Linear]}),
    ],
)
def test_bad_input_changes_nothing(net: nn.Module, call: Any) -> None:
    set_z3_leaf_module(net.layers[0], True)
    before = state(net)
    with pytest.raises((LeafNotFoundError, LeafTypeError, LeafValueError, ZeroDivisionError)):
        call(net)
    assert state(net) == before


def test_what_is_missing_is_said_even_when_nothing_is_raised(net: nn.Module, caplog: Any) -> None:
    assert set_z3_leaf_modules_by_name(net, ["head", "tail"], raise_if_not_found=False) == ([net.head], ["tail"])
    assert set_z3_leaf_modules_by_suffix(net, [".tail"], raise_if_not_found=False) == ([], [".tail"])
    assert len(set_z3_leaf_modules(net, ["MoeBlock", nn.Conv2d], raise_if_not_found=False)) == 12
    assert set_z3_leaf_modules(net, [], raise_if_not_found=False) == []
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("ds.z3leaf", "WARNING", "nothing in Net matches name 'tail'"),
        ("ds.z3leaf", "WARNING", "nothing in Net matches suffix 'tail'"),
        ("ds.z3leaf", "WARNING", "nothing in Net matches class 'Conv2d'"),
    ]


def test_the_outermost_leaf_owns_the_parameters(net: nn.Module) -> None:
    layer = net.layers[0]
    for order in ([layer.mlp, layer], [layer, layer.mlp]):
        for module in order:
            set_z3_leaf_module(module, True)
        assert layer.mlp.gate.weight.ds_z3_leaf_module is layer
        set_z3_leaf_module(layer, False)
        assert layer.mlp.gate.weight.ds_z3_leaf_module is layer.mlp
        assert not z3_leaf_parameter(layer.attention.weight)
        set_z3_leaf_module(layer.mlp, False)
        assert state(net) == CLEAN


def test_taking_an_inner_flag_away_leaves_the_outer_leaf_alone(net: nn.Module) -> None:
    layer = net.layers[0]
    mark_leaves(net, modules=[layer, layer.mlp])
    set_z3_leaf_module(layer.mlp, False)
    assert get_z3_leaf_modules(net) == [layer]
    assert layer.mlp.gate.weight.ds_z3_leaf_module is layer


def test_a_class_that_is_a_leaf_by_itself_can_be_switched_off() -> None:
    class Always(nn.Linear):
        _z3_leaf = True

    module = Always(1, 1)
    assert z3_leaf_module(module)
    set_z3_leaf_module(module, False)
    assert not z3_leaf_module(module)
    assert z3_leaf_module(Always(1, 1))


def test_marking_by_every_kind_of_selector(net: nn.Module, kinds: Kinds) -> None:
    found = mark_leaves(
        net,
        classes=kinds["SparseBlock"],
        names="head",
        suffixes="1.mlp",
        globs="layers.[23].mlp",
        where=lambda name, module: name == "layers.4.mlp",
        modules=net.layers[5].mlp,
    )
    assert found == [*(net.layers[i].mlp for i in (1, 2, 3, 4, 5, 11)), net.head]
    assert mark_leaves(net, globs="**.mlp", flag=False, names="head") == [
        *(layer.mlp for layer in net.layers),
        net.head,
    ]
    assert state(net) == CLEAN


@pytest.mark.parametrize(
    "call",
    [
        lambda net: set_z3_leaf_modules_by_name(net, ["head", "layers.0.mlp.experts"]),
        lambda net: set_z3_leaf_modules_by_suffix(net, ["0.mlp.experts"]),
        lambda net: mark_leaves(net, globs="layers.0.mlp.experts", names="head"),
        lambda net: mark_leaves(net, globs="layers.0.mlp.experts", names="head", raise_if_not_found=False),
        lambda net: mark_leaves(net, modules=[net.head, net.layers[0].mlp.experts]),
        lambda net: plan_leaves(net, names=["head", "layers.0.mlp.experts"]),
        lambda net: z3_leaves(net, names=["head", "layers.0.mlp.experts"]).__enter__(),
    ],
)
def test_a_container_that_is_never_called_is_refused_with_the_fix(net: nn.Module, call: Any) -> None:
    before = state(net)
    with pytest.raises(LeafValueError) as caught:
        call(net)
    assert str(caught.value) == (
        "leaf 'layers.0.mlp.experts' is a ModuleList, which is never called itself, so that no engine can gather it: "
        "flag what holds it, names='layers.0.mlp'"
    )
    assert state(net) == before


def test_the_fix_for_several_containers_and_for_those_without_a_parent(net: nn.Module) -> None:
    with pytest.raises(LeafValueError, match=r"experts' \(and 11 more\).*=\['layers.0.mlp', .*'layers.3.mlp', ...\]"):
        mark_leaves(net, suffixes="mlp.experts")
    with pytest.raises(LeafValueError, match=r"leaf 'layers' \(and 12 more\).* flag the Net itself, modules=model"):
        mark_leaves(net, classes="ModuleList")
    with pytest.raises(LeafValueError, match=r"leaf '' is a ModuleList.* flag the module that holds it"):
        set_z3_leaf_module(net.layers, True)
    assert state(net) == CLEAN
    set_z3_leaf_module(net.layers, False)
    mark_leaves(net, classes="ModuleList", flag=False)
    assert state(net) == CLEAN


def test_deepspeeds_names_only_warn_of_a_container_where_they_raise_nothing(net: nn.Module, caplog: Any) -> None:
    found, _ = set_z3_leaf_modules_by_name(net, ["layers.0.mlp.experts"], raise_if_not_found=False)
    assert found == get_z3_leaf_modules(net) == [net.layers[0].mlp.experts]
    assert "leaf 'layers.0.mlp.experts' is a ModuleList, which is never called itself" in caplog.text
    caplog.clear()
    set_z3_leaf_modules_by_name(net, ["layers.0.mlp.experts"], False)
    assert state(net) == CLEAN
    apply_zero_leaf_module_config(net, {"names": ["layers.0.mlp.experts"]})
    assert "never called itself" in caplog.text


# Leaves inside leaves


def test_leaves_inside_leaves_are_not_flagged_and_one_warning_says_so(net: nn.Module, caplog: Any) -> None:
    found = mark_leaves(net, suffixes=["mlp", "up"])
    assert len(found) == 12 * 4
    assert get_z3_leaf_modules(net) == [layer.mlp for layer in net.layers]
    assert [record.message for record in caplog.records] == [
        "36 modules are parts of other leaves and not flagged by themselves: 'layers.0.mlp.experts.0.up' (Linear) is "
        "in 'layers.0.mlp', which is gathered whole"
    ]
    caplog.clear()
    assert mark_leaves(net, names="layers.3") == [net.layers[3]]
    assert get_z3_leaf_modules(net)[3] is net.layers[3]
    assert len(get_z3_leaf_modules(net)) == 12
    assert net.layers[3].mlp.gate.weight.ds_z3_leaf_module is net.layers[3]
    assert "1 module is a part of other leaves and not flagged by itself: 'layers.3.mlp' (MoeBlock)" in caplog.text
    caplog.clear()
    before = state(net)
    assert set_z3_leaf_modules_by_name(net, ["layers.3.mlp.gate"]) == ([net.layers[3].mlp.gate], [])
    assert state(net) == before
    assert "'layers.3.mlp.gate' (Linear) is in 'layers.3'" in caplog.text


def test_a_module_with_a_place_outside_of_the_leaf_stays_a_leaf() -> None:
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"block": nn.Sequential(shared), "again": nn.Sequential(shared)})
    mark_leaves(model, modules=[model["block"], shared])
    assert get_z3_leaf_modules(model) == [model["block"], shared]


def test_a_compiled_module_is_one_leaf(caplog: Any) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1))
    plain = model[0]
    model[0] = torch.compile(plain, backend="eager")
    for _ in range(2):
        mark_leaves(model, names="0")
        assert z3_leaf_module(model[0])
        assert z3_leaf_module(plain)
        assert plain[0].weight.ds_z3_leaf_module is model[0]
    mark_leaves(model, names="0", flag=False)
    assert state(model) == CLEAN
    assert caplog.text == ""


# "auto"


def test_auto_flags_the_mixtures_and_leaves_dense_models_alone(net: nn.Module, caplog: Any) -> None:
    blocks = [layer.mlp for layer in net.layers]
    assert mark_leaves(net, "auto") == blocks == get_z3_leaf_modules(net)
    assert mark_leaves(net, select="auto", names="head") == [*blocks, net.head]
    assert mark_leaves(net, "auto", names="head", flag=False) == [*blocks, net.head]
    assert state(net) == CLEAN
    dense = nn.Sequential(nn.Linear(1, 1))
    with caplog.at_level(logging.INFO):
        assert mark_leaves(dense, "auto") == []
        assert mark_leaves(dense, "auto", names="0") == [dense[0]]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    for wrong, error in (("mlp", LeafValueError), (3, LeafTypeError), (nn.Linear, LeafTypeError)):
        with pytest.raises(error, match='pass "auto"'):
            mark_leaves(net, wrong)  # type: ignore[arg-type]


# For the length of a block


def assert_differs(one: Any, other: Any) -> None:
    assert one != other


def test_a_block_gives_back_what_was_flagged(net: nn.Module) -> None:
    mark_leaves(net, names=["layers.0.mlp", "head"])
    before, reason = state(net), net.head._ds_leaf_reason
    with z3_leaves(net, "auto") as leaves:
        assert leaves == [layer.mlp for layer in net.layers]
        inside = state(net)
        with z3_leaves(net, names="layers.0"):  # the flag of layers.0.mlp goes, and comes back
            assert get_z3_leaf_modules(net)[0] is net.layers[0]
        assert state(net) == inside
        net.layers[1].mlp = type(net.layers[1].mlp)()
        mark_leaves(net, names="layers.1.mlp")
    assert state(net) == before
    assert net.head._ds_leaf_reason == reason
    with pytest.raises(ZeroDivisionError), z3_leaves(net, suffixes="mlp"):
        raise ZeroDivisionError(assert_differs(state(net), before))
    assert state(net) == before
    with pytest.raises(LeafNotFoundError), z3_leaves(net, names="tail"):
        pass
    assert state(net) == before


def test_an_engine_that_is_built_inside_the_block_keeps_its_leaves(net: nn.Module) -> None:
    with z3_leaves(net, names="head"):
        net.head.ds_id = 7  # as ZeRO-3's hooks leave it
        mark_leaves(net, names="layers.0")
    assert get_z3_leaf_modules(net) == [net.head]
    assert z3_leaf_parameter(net.head.weight)
    assert not z3_leaf_parameter(next(net.layers[0].parameters()))
    set_z3_leaf_module(net.head, False)
    assert state(net) == CLEAN


def test_a_marked_model_can_be_copied_and_pickled() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    set_z3_leaf_module(model[1], True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert get_z3_leaf_modules(other) == [other[1]]
        assert all(getattr(param, "ds_z3_leaf_module", other[1]) is other[1] for param in other[1].parameters())
    assert all(not vars(tensor) for tensor in model.state_dict().values())


@pytest.mark.parametrize("call", [get_z3_leaf_modules, lambda model: set_z3_leaf_module(model, True)])
def test_a_model_is_a_module(call: Any) -> None:
    with pytest.raises(LeafTypeError, match="model is a list"):
        call([])
    with pytest.raises(LeafTypeError, match="model is a list"):
        apply_zero_leaf_module_config([], None)  # type: ignore[arg-type]


# The configuration section


def test_no_section_flags_nothing(net: nn.Module) -> None:
    assert apply_zero_leaf_module_config(net, None) == []
    assert state(net) == CLEAN


@pytest.mark.parametrize("make", [dict, lambda **fields: SimpleNamespace(**fields)])
def test_a_section_is_a_mapping_or_an_object(net: nn.Module, make: Any) -> None:
    section = make(classes=["SparseBlock"], names="head", name_suffixes=["1.mlp", "1.mlp"])
    assert apply_zero_leaf_module_config(net, section) == [net.layers[1].mlp, net.layers[11].mlp, net.head]
    assert len(get_z3_leaf_modules(net)) == 3


def test_default_classes_may_be_missing_and_others_are_warned_about(net: nn.Module, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG):
        assert apply_zero_leaf_module_config(net, {}) == []
        assert caplog.records == []
        assert apply_zero_leaf_module_config(net, {"names": ["head", "tail"]}) == [net.head]
        assert apply_zero_leaf_module_config(net, {"classes": []}) == []
    assert [record.message for record in caplog.records] == ["nothing in Net matches name 'tail'"]


def test_default_classes_are_found_by_their_full_name() -> None:
    block = type("MixtralSparseMoeBlock", (nn.Linear,), {"__module__": "transformers.models.mixtral.modeling_mixtral"})
    model = nn.Sequential(block(1, 1))
    assert apply_zero_leaf_module_config(model, {}) == [model[0]]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"class": ["A"]}, r"leaf_cfg has the key 'class', which is none of .*; did you mean 'classes'\?"),
        ({"suffix": "mlp"}, "leaf_cfg has the key 'suffix'"),
        ({"names": 3}, "leaf_cfg.names is a int"),
        ({"names": [3]}, "leaf_cfg.names holds a int"),
        (["mlp"], "leaf_cfg is a list without"),
    ],
)
def test_a_bad_section(net: nn.Module, section: Any, message: str) -> None:
    with pytest.raises((LeafTypeError, LeafValueError), match=message):
        apply_zero_leaf_module_config(net, section)


@pytest.mark.parametrize("choose", [mark_leaves, plan_leaves])
def test_an_empty_list_of_candidates_is_no_error(choose: Any) -> None:
    dense = nn.Sequential(nn.Linear(2, 2))
    assert list(choose(dense, modules=[found.module for found in find_leaf_candidates(dense)])) == []
    assert get_z3_leaf_modules(dense) == []
    assert fully_shard_leaves(dense, []) == []
    with pytest.raises(LeafValueError, match="no selector is given"):
        choose(dense)

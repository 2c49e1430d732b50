from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_z3leaf import (
    LeafCandidate,
    LeafNotFoundError,
    LeafPlan,
    LeafRehearsalError,
    LeafShardError,
    LeafTypeError,
    LeafValueError,
    find_fine_grained,
    find_leaf_candidates,
    get_z3_leaf_modules,
    leaf_report,
    mark_leaves,
    plan_leaves,
    rehearse,
    set_z3_leaf_module,
)
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

WIDTH = 4


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, choice = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.experts[index](x[rows]) * best[rows].unsqueeze(-1))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.mlp = Moe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


def make(layers: int = 3) -> Model:
    torch.manual_seed(0)
    return Model(layers).double()


# Choosing


def test_auto_is_what_the_evidence_says() -> None:
    model = make()
    plan = plan_leaves(model, "auto")
    assert plan.modules == [layer.mlp for layer in model.layers]
    assert get_z3_leaf_modules(model) == []
    assert all("3 experts" in leaf.reason for leaf in plan)
    assert plan.apply_deepspeed() == plan.modules == get_z3_leaf_modules(model)
    assert [row.why for row in leaf_report(model)] == [leaf.reason for leaf in plan]


def test_selectors_and_auto_are_a_union_without_leaves_inside_leaves() -> None:
    model = make()
    plan = plan_leaves(model, "auto", names=["layers.1", "head"], suffixes="experts.0")
    assert [leaf.name for leaf in plan] == ["layers.0.mlp", "layers.1", "layers.2.mlp", "head"]
    assert plan.leaves[1].reason == "selected by name 'layers.1'"
    assert "'layers.1.mlp' is in the leaf 'layers.1', which is gathered whole" in plan.notes
    assert plan_leaves(model, names=["head", "tail"], raise_if_not_found=False).notes == (
        "nothing matches name 'tail'",
    )
    lines = str(plan).splitlines()
    assert lines[0].split() == ["leaf", "class", "parameters", "bytes", "why"]
    assert lines[2].split() == ["layers.1", "Layer", "95", "760", "selected", "by", "name", "'layers.1'"]


# Saving


def test_a_plan_comes_back_for_a_model_that_is_wrapped_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = plan_leaves(make(), "auto", names="head")
    plan.save(path)
    other = make()
    other.layers[1] = torch.compile(other.layers[1], backend="eager")
    other.layers[2].mlp = checkpoint_wrapper(other.layers[2].mlp)
    loaded = LeafPlan.load(path, other)
    assert [leaf.name for leaf in loaded] == ["layers.0.mlp", "layers.1._orig_mod.mlp", "layers.2.mlp", "head"]
    assert loaded.modules[2] is other.layers[2].mlp
    assert [leaf.reason for leaf in loaded] == [leaf.reason for leaf in plan]
    loaded.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())


def test_what_a_file_says_wrongly_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_leaves(make(), "auto").save(path)
    good = json.loads(path.read_text())

    def load(data: Any) -> LeafPlan:
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return LeafPlan.load(path, make(2))

    with pytest.raises(LeafNotFoundError, match=r"1 of 3 leaves .* 'layers.2.mlp' \(near: 'layers.1.mlp'"):
        load(good)
    with pytest.raises(LeafValueError, match="is no leaf plan: it is not JSON"):
        load("{")
    with pytest.raises(LeafValueError, match="has the format 2, and this ds-z3leaf reads up to 1"):
        load(good | {"format": 2})
    for bad in (
        [],
        {},
        good | {"format": "1"},
        good | {"format": True},
        "[" * 100_000,
        good | {"leaves": 3},
        good | {"notes": 3, "leaves": []},
    ):
        with pytest.raises(LeafValueError, match="is no leaf plan"):
            load(bad)
    with pytest.raises(LeafValueError, match="a leaf has no reason and parameters of the right type"):
        load(good | {"leaves": [{"name": "head", "class": "Linear"}]})
    rows = good["leaves"][:1]
    with pytest.raises(LeafValueError, match=r"leaf 'layers.0.mlp' is a Block in the plan and a Moe in the model"):
        load(good | {"leaves": [rows[0] | {"class": "Block"}]})
    assert "has 75 elements, and had 7 in the plan" in load(good | {"leaves": [rows[0] | {"parameters": 7}]}).notes[0]
    with pytest.raises(OSError, match="absent"):
        LeafPlan.load(tmp_path / "absent.json", make())
    with pytest.raises(LeafTypeError, match="model is a list"):
        LeafPlan.load(path, [])  # type: ignore[arg-type]


# Reporting


def test_the_report_counts_gathers_and_bytes() -> None:
    model = make()
    mark_leaves(model, names="layers.0.mlp")
    set_z3_leaf_module(model.head, True)
    model.inp._z3_leaf = True  # by somebody else
    report = leaf_report(model)
    assert report.to_dict()["leaves"][1] == {
        "name": "layers.0.mlp",
        "class_name": "Moe",
        "why": "selected by name 'layers.0.mlp'",
        "parameters": 75,
        "bytes": 600,
        "gathers_before": 8,
        "gathers_after": 2,
        "peak_before": 160,
        "peak_after": 600,
    }
    assert [row.why for row in report] == [
        "flagged, reason unknown",
        "selected by name 'layers.0.mlp'",
        "flagged by set_z3_leaf_module()",
    ]
    assert "8 -> 2" in str(report)
    mark_leaves(model, classes="Moe", names=["head", "inp"], flag=False)
    assert str(leaf_report(model)) == "Model has no leaves"
    assert not any("_ds_leaf_reason" in vars(module) for module in model.modules())


# Fine-grained


def test_fine_grained_modules_are_the_outermost_with_few_elements_each() -> None:
    model = make(2)
    # Moe: 75 elements in 5 modules with parameters (itself, gate, 3 experts); Layer: 95 in 7; Model: 220 in 17
    found = find_fine_grained(model, max_elements_per_module=13, max_elements=100)
    assert [leaf.name for leaf in found] == ["layers.0", "layers.1"]
    assert [leaf.name for leaf in find_fine_grained(model, max_elements_per_module=12)] == [""]
    assert find_fine_grained(model, max_elements_per_module=11) == []
    assert mark_leaves(model, fine_grained=1000, names="head") == [model, model.head]
    mark_leaves(model, names="head", modules=model, flag=False)
    with pytest.raises(LeafNotFoundError, match=r"fine_grained 3 \(the smallest is \d+, of '.*'\)"):
        mark_leaves(model, fine_grained=3)
    assert mark_leaves(model, fine_grained=3, raise_if_not_found=False) == []
    assert find_fine_grained(model, max_elements_per_module=1000, max_elements=100)[0].name == "layers.0"
    for wrong, error in ((0, LeafValueError), (-1, LeafValueError), ("1", LeafTypeError), (True, LeafTypeError)):
        with pytest.raises(error, match="max_elements_per_module"):
            find_fine_grained(model, max_elements_per_module=wrong)  # type: ignore[arg-type]


# FSDP2


class PeakMeter:
    """The bytes of gathered parameters of all units, and how often they are gathered, as torch does it."""

    def __init__(self, units: list[Any]) -> None:
        self.now = self.peak = self.gathers = self.largest = 0
        for unit in units:
            state = unit._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # torch before 2.13 has one
            for group in groups if groups is not None else filter(None, [state._fsdp_param_group]):
                self._watch(group)

    def _watch(self, group: Any) -> None:
        size = sum(param._orig_size.numel() * param.orig_dtype.itemsize for param in group.fsdp_params)
        unshard, reshard = group.unshard, group._to_sharded
        held = [False]

        def count_gather(*args: Any, **kwargs: Any) -> Any:
            if not held[0] and group.is_sharded:
                held[0] = True
                self.now += size
                self.gathers += 1
                self.largest = max(self.largest, size)
                self.peak = max(self.peak, self.now)
            return unshard(*args, **kwargs)

        def count_free(*args: Any, **kwargs: Any) -> Any:
            if held[0]:
                held[0] = False
                self.now -= size
            return reshard(*args, **kwargs)

        group.unshard, group._to_sharded = count_gather, count_free


def batch(rank: int) -> torch.Tensor:
    return 2 * torch.randn(rank + 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def apply_fsdp2(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule

    model, dense = make(), make()
    for copy in (model, dense):
        copy.layers[1].attention.requires_grad_(False)
    plan = plan_leaves(model, "auto")
    costs = {row.cut: row.to_dict() for row in plan.costs()}
    units = plan.apply_fsdp2()
    assert units == [*plan.modules, *model.layers, model]
    assert {id(unit) for unit in units} == {id(part) for part in model.modules() if isinstance(part, FSDPModule)}
    model(batch(rank)).backward()  # the first step learns the order of the units
    for param in model.parameters():
        param.grad = None
    meter = PeakMeter(units)
    model(batch(rank)).backward()
    sum(dense(batch(r)) / world for r in range(world)).backward()
    for (name, param), other in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if other[1].requires_grad:
            grad = torch.zeros_like(other[1]) if other[1].grad is None else other[1].grad
            torch.testing.assert_close(param.grad.full_tensor(), grad, msg=name)
    measured = {"gathers": meter.gathers, "largest_bytes": meter.largest, "peak_bytes": meter.peak}
    return {"costs": costs, "measured": measured}


@pytest.mark.parametrize("world", [1, 2])
def test_a_plan_trains_as_it_is_and_costs_what_it_says(world: int) -> None:
    for seen in run_ranks(apply_fsdp2, world, world):
        costs = seen["costs"]["layers"]
        assert {key: costs[key] for key in seen["measured"]} == seen["measured"]
        assert costs["units"] == 7


def test_the_costs_of_every_cut() -> None:
    model = make(2).float()
    table = plan_leaves(model, "auto").costs()
    linear, expert, moe = 80, 80, 300
    rows = {row.cut: (row.units, row.gathers, row.largest_bytes, row.peak_bytes) for row in table}
    assert rows == {
        # inp, 2 x (attention, gate, 3 experts), head; no unit around another, one gathered ahead
        "every module": (12, 24, linear, linear + expert),
        # inp, 2 x (attention, the block), head
        "leaves": (6, 12, moe, moe + linear),
        # the root (inp and head), a layer (attention), its block, and the layer before
        "layers": (5, 9, moe, 80 + 40 + linear + moe + linear),
        "whole model": (1, 1, 880, 880),
    }
    assert plan_leaves(model, "auto").costs(torch.bfloat16)[1].largest_bytes == moe // 2
    assert str(table).splitlines()[0].split("  ")[0] == "cut"


def refuse(rank: int) -> list[str]:
    from torch.distributed.fsdp import FSDPModule

    said = []

    def note(error: type[Exception], model: nn.Module, **options: Any) -> None:
        try:
            plan_leaves(model, "auto").apply_fsdp2(**options)
        except error as caught:
            said.append(str(caught))
        assert not any(isinstance(part, FSDPModule) for part in model.modules())

    tied = make()
    tied.head.weight, tied.layers[0].attention.weight = (tied.inp.weight,) * 2
    note(LeafShardError, tied)
    mixed = make()
    mixed.layers[0].norm = nn.LayerNorm(WIDTH)
    note(LeafShardError, mixed)
    mixed = make()
    mixed.head.float()
    note(LeafShardError, mixed)
    note(LeafValueError, make(), layers="all")
    note(LeafTypeError, make(), layers=3)
    note(LeafNotFoundError, make(), layers=nn.Linear(1, 1))
    note(LeafTypeError, make(), meshes=1)
    model = make()
    units = plan_leaves(model, "auto").apply_fsdp2(layers=[model.layers[1]], root=False)
    assert units == [*(layer.mlp for layer in model.layers), model.layers[1]]
    return said


def test_layers_and_root_are_checked_before_anything_is_sharded() -> None:
    starts = [
        "layer 'layers.0' (Layer) and root '' (Model) share a parameter",
        "layer 'layers.0' (Layer) holds trainable parameters of several dtypes",
        "root '' (Model) holds trainable parameters of several dtypes",
        "layers is 'all': pass \"auto\"",
        "layers is a int",
        "1 of 1 selectors matches nothing in Model",
        "torch's fully_shard does not take these keywords",
    ]
    for said in run_ranks(refuse, 2):
        assert len(said) == len(starts), said
        for text, start in zip(said, starts, strict=True):
            assert text.startswith(start)


def mixtures_left_out(rank: int) -> tuple[list[str], list[str]]:
    import logging

    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logging.getLogger("ds.z3leaf").addHandler(Keep())
    model = nn.Sequential(Moe().double(), Moe().double())
    units = plan_leaves(model, names="0").apply_fsdp2()
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(unit)] for unit in units], records


def test_experts_of_a_mixture_that_is_no_leaf_are_never_layers() -> None:
    for names, records in run_ranks(mixtures_left_out, 2):
        assert names == ["0", ""]
        assert len(records) == 1
        assert records[0].startswith("1 (Moe) looks like a mixture of experts and is no leaf of the plan")


def test_a_plan_has_only_modules_of_its_model_each_once() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(LeafNotFoundError, match="no module of the Sequential"):
        LeafPlan(model, [LeafCandidate.of("0", nn.Linear(2, 2), "why")])
    inner, outer = LeafCandidate.of("0.0", model[0][0], "why"), LeafCandidate.of("0", model[0], "why")
    for leaves in ([outer, inner], [inner, inner]):
        with pytest.raises(LeafValueError, match=r"leaf '0\.0' is given twice or is inside another leaf"):
            LeafPlan(model, leaves)


def test_scripted_modules_are_no_candidates() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to drop torch.jit
        model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))
    assert find_leaf_candidates(model) == []
    with pytest.raises(LeafRehearsalError, match="0 is a ScriptModule"):
        rehearse(model, [torch.ones(1, 2)])

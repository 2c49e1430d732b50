"""Every operation that the installed torch has is known by its name."""

import pytest
from ds_logging._comms.bandwidth import RULES, canonical_name, rule_of

torch = pytest.importorskip("torch")

WORDS = ("gather", "reduce", "all_to_all", "alltoall", "broadcast", "scatter", "send", "recv", "barrier")


def functions_of(module):
    found = {name: getattr(module, name) for name in dir(module) if any(word in name for word in WORDS)}
    return [name for name, value in found.items() if callable(value) and not isinstance(value, type)]


def test_every_function_of_torch_distributed_has_a_formula():
    import torch.distributed as dist

    names = functions_of(dist)
    assert len(names) > 20
    assert [name for name in names if rule_of(name) is None] == []


def test_every_method_of_a_process_group_has_a_formula():
    names = functions_of(torch.distributed.ProcessGroup)
    assert len(names) > 15
    assert [name for name in names if rule_of(name) is None and not name.startswith("_")] == []


def test_every_operator_has_a_formula():
    import torch.distributed._functional_collectives

    names = [schema.name for schema in torch._C._jit_get_all_schemas()]
    names = [name for name in names if name.startswith(("c10d::", "_c10d_functional", "c10d_functional"))]
    names = [name for name in names if any(word in name for word in WORDS)]
    assert len(names) > 30
    assert [name for name in names if rule_of(name) is None] == []


def test_the_functional_collectives_have_a_formula():
    import torch.distributed._functional_collectives as functional

    names = [name for name in functions_of(functional) if not name.startswith("_")]
    names = [name for name in names if not name.endswith(("_backward", "_setup_context"))]
    assert len(names) > 10
    assert [name for name in names if rule_of(name) is None] == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("all_gather_into_tensor", "all_gather"),
        ("reduce_scatter_tensor", "reduce_scatter"),
        ("all_to_all_single", "all_to_all"),
        ("all_reduce", "all_reduce"),
    ],
)
def test_names_with_one_meaning(name, wanted):
    assert hasattr(torch.distributed, name)
    assert canonical_name(name) == wanted
    assert wanted in RULES

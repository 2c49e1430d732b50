import torch
from ds_ondevice._slots import find_parts, find_slots
from torch import nn


def module_with_tensors_everywhere():
    module = nn.Module()
    module.child = nn.Linear(2, 2, bias=False, device="meta")
    module.register_buffer("kept", torch.zeros(1, device="meta"))
    module.register_buffer("dropped", torch.zeros(1), persistent=False)
    module.register_buffer("none", None)
    module.plain = torch.zeros(1, device="meta")
    module.real = torch.zeros(1)
    module.nested = {"a": [torch.zeros(1, device="meta"), 3], "b": (torch.zeros(2),)}
    module.numbers = [1, 2]
    return module


def test_find_slots():
    slots = list(find_slots(find_parts(module_with_tensors_everywhere())))
    assert [(slot.name, slot.kind) for slot in slots] == [
        ("kept", "buffer"),
        ("dropped", "buffer"),
        ("plain", "attribute"),
        ("nested", "attribute"),
        ("child.weight", "parameter"),
    ]
    assert [len(slot.held) for slot in slots] == [1, 1, 1, 1, 1]


def test_put_replaces_by_identity_and_leaves_the_rest():
    module = module_with_tensors_everywhere()
    slots = list(find_slots(find_parts(module)))
    real, nested, numbers = module.real, module.nested, module.numbers
    new = {id(t): torch.ones(t.shape) for slot in slots for t in slot.held if t.is_meta and slot.kind != "parameter"}
    for slot in slots:
        slot.put(new)
    assert module.kept.tolist() == module.plain.tolist() == module.nested["a"][0].tolist() == [1.0]
    assert module.nested["a"][1] == 3
    assert module.nested["b"][0] is nested["b"][0]
    assert module.real is real
    assert module.numbers is numbers
    assert module.child.weight.is_meta
    assert list(module.state_dict()) == ["kept", "child.weight"]

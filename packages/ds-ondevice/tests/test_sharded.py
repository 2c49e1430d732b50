"""Models sharded by FSDP2, on two ranks."""

import pytest
import torch
from ds_ondevice import OnDevice, UnrestorableError, materialize
from ranks import run_ranks
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0, 6, 2).float() / 6)), persistent=False)
        nn.init.trunc_normal_(self.layers[0][0].weight)

    def forward(self, x):
        hidden = self.embedding(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden * self.inv_freq.sum())


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def one_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(torch.arange(8).view(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded_run(rank):
    torch.manual_seed(3)
    eager = Model()
    models = {}
    with OnDevice(torch.float32, device="meta"):
        models["inside"] = shard(Model())
    with OnDevice(torch.float32, device="meta"):
        models["after"] = Model()
    for when, model in models.items():
        torch.manual_seed(3)
        report = materialize(model, "cpu")
        assert report.missing == report.uninitialized == ()
        if when == "after":
            shard(model)
        for (name, actual), (_, expected) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
            assert actual.to_local().numel() < expected.numel(), name
            assert torch.equal(actual.full_tensor(), expected), name
        assert model.head.weight is model.embedding.weight
        assert torch.equal(model.inv_freq, eager.inv_freq)
    expected = one_step(eager)
    return [(one_step(model), expected) for model in models.values()]


def test_shards_hold_the_values_of_eager_construction_and_train():
    for results in run_ranks(sharded_run, 2):
        for sharded, eager in results:
            torch.testing.assert_close(sharded, eager, rtol=1e-5, atol=1e-6)


def wrongly_sharded(rank):
    with OnDevice(torch.float32, device="meta"):
        outside = Model()
    shard(outside)
    with pytest.raises(UnrestorableError) as not_recorded:
        materialize(outside, "cpu")
    assert all(parameter.is_meta for parameter in outside.parameters())

    def fallback(module):
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 2.0)

    report = materialize(outside, "cpu", fallback=fallback)
    full = outside.embedding.weight.full_tensor().unique().tolist()

    with OnDevice(torch.float32, device="meta"):
        drawn = shard(Model())
        nn.init.normal_(drawn.layers[0][0].weight)
        nn.init.trunc_normal_(drawn.layers[0][2].weight)
    with pytest.raises(UnrestorableError) as drawn_into:
        materialize(drawn, "cpu")

    with OnDevice(torch.float32, device="meta"):
        elsewhere = shard(Model())
    elsewhere.embedding.weight._spec.mesh._device_type = "cuda"
    with pytest.raises(UnrestorableError) as other_mesh:
        materialize(elsewhere, "cpu", strict=False)
    return not_recorded.value.reasons, drawn_into.value.reasons, other_mesh.value.reasons, report, full


def test_what_cannot_be_restored_is_named():
    for not_recorded, drawn_into, other_mesh, report, full in run_ranks(wrongly_sharded, 2):
        assert "it was sharded outside" in not_recorded["embedding.weight"]
        assert "layers.1.2.bias" in report.initialized
        assert report.restored == ("inv_freq",)
        assert full == [2.0]
        assert list(drawn_into) == ["layers.0.0.weight", "layers.0.2.weight"]
        assert all("draws random numbers into a sharded tensor" in reason for reason in drawn_into.values())
        assert other_mesh["embedding.weight"] == "its device mesh is of cuda devices, not cpu"


def same_everywhere(rank):
    with OnDevice(torch.bfloat16, device="meta"):
        model = Model()
    torch.manual_seed(11)
    materialize(model, "cpu")
    return [parameter.float().tolist() for parameter in model.parameters()]


def test_equal_seeds_give_equal_weights_on_all_ranks():
    first, second = run_ranks(same_everywhere, 2, init=False)
    assert first == second

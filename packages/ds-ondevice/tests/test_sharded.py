"""Models sharded by FSDP2, on two ranks."""

import pytest
import torch
from ds_ondevice import OnDevice, RecordingMismatchError, UnrestorableError, materialize
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
    with OnDevice(torch.float32, device="meta"):
        models["in between"] = Model()
    shard(models["in between"])
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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    with OnDevice(torch.float32, device="meta"):
        outside = Model()
    parallelize_module(outside, init_device_mesh("cpu", (2,)), {"embedding": ColwiseParallel()})
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
        assert report.initialized == ("embedding.weight",)
        assert {"inv_freq", "layers.1.2.bias"} <= set(report.restored)
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


def tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Parallel(nn.Module):
        def __init__(self, mesh):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))
            self.table = nn.Parameter(torch.rand(5, 6))
            self.copied = nn.Parameter(torch.rand(3))
            if mesh is not None:
                for layer in self.layers:
                    parallelize_module(layer, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
                self.table = nn.Parameter(distribute_tensor(self.table.detach(), mesh, [Shard(0)]))  # 5 rows: uneven
                self.copied = nn.Parameter(distribute_tensor(self.copied.detach(), mesh, [Replicate()]))

    torch.manual_seed(3)
    eager = Parallel(None)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    for sharded in (False, True):
        with OnDevice(torch.float32, device="meta"):
            model = Parallel(mesh["model"])
            if sharded:
                for layer in model.layers:
                    fully_shard(layer, mesh=mesh["data"])
        torch.manual_seed(3)
        report = materialize(model, "cpu")
        assert report.missing == report.uninitialized == ()
        for (name, actual), (_, expected) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
            assert torch.equal(actual.full_tensor(), expected), (name, sharded)


def test_tensor_parallel_inside_the_block_with_and_without_fsdp2():
    run_ranks(tensor_parallel, 4)


def differing(rank, what):
    torch.manual_seed(100 + (rank if what == "seed" else 0))
    with OnDevice(torch.float32, device="meta"):
        model = Model()
        if what == "recording" and rank == 1:
            nn.init.normal_(model.layers[1][0].weight, std=0.5)
        if what == "tensors" and rank == 1:
            model.extra = nn.Linear(2, 2, bias=False)
        if what == "constructor":
            torch.manual_seed(rank)
            nn.init.normal_(model.layers[1][0].weight)
        shard(model)
    before = torch.get_rng_state()
    with pytest.raises(RecordingMismatchError) as error:
        materialize(model, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in model.parameters())
    return error.value.first, error.value.others


@pytest.mark.parametrize("what", ["seed", "recording", "tensors", "constructor"])
def test_ranks_that_differ_are_named_before_anything_is_drawn(what):
    expected = {"tensors": ("tensors", "recording"), "constructor": ("recording", "seed")}.get(what, (what,))
    for first, others in run_ranks(differing, 2, what):
        assert (first, others) == (0, {1: expected})


def communicating(rank):
    import torch.distributed as dist

    with OnDevice(torch.float32, device="meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        dist.broadcast(model[0].weight.data, 0)
        parts = [torch.empty(4) for _ in range(2)]
        dist.all_gather(parts, model[0].bias.data)
        model.parts = parts
    with pytest.raises(UnrestorableError) as error:
        materialize(model, "cpu")
    return error.value.reasons


def test_communication_inside_the_block_is_refused():
    for reasons in run_ranks(communicating, 2):
        assert {"0.weight", "parts"} <= set(reasons)
        assert "exchanges values with other ranks" in reasons["0.weight"]
        assert not any(name.startswith("1.") for name in reasons)


def changed_before_sharding(rank):
    with OnDevice(torch.float32, device="meta"):
        model = Model()
    nn.init.normal_(model.layers[0][0].weight)
    shard(model)
    with pytest.raises(UnrestorableError) as error:
        materialize(model, "cpu")
    return list(error.value.reasons)


def test_a_parameter_that_was_changed_before_it_was_sharded_is_named():
    assert run_ranks(changed_before_sharding, 2) == [["layers.0.0.weight"]] * 2


def optimizer_made_before(rank):
    torch.manual_seed(3)
    eager = Model()
    with OnDevice(torch.float32, device="meta"):
        model = shard(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    assert materialize(model, "cpu").replaced == ()
    expected = torch.optim.SGD(eager.parameters(), lr=0.1)
    for each, steps in ((model, optimizer), (eager, expected)):
        each(torch.arange(8).view(2, 4)).square().mean().backward()
        steps.step()
    for (name, actual), (_, wanted) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(actual.full_tensor(), wanted, msg=name)


def test_an_optimizer_made_before_goes_on():
    run_ranks(optimizer_made_before, 2)

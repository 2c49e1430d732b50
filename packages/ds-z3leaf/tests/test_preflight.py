"""What is refused before sharding fails with torch's own ``fully_shard`` too; what passes trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ds_z3leaf import LeafPlan, LeafShardError, LeafValueError, fully_shard_leaves, plan_leaves
from ds_z3leaf._always_called import always_calls
from ds_z3leaf._preflight import _torch_version
from ranks import run_ranks
from torch import nn

WIDTH = 4


class Moe(nn.Module):
    """Two experts, both used; `extra` is added to the output if it is a number."""

    def __init__(self, extra: nn.Parameter | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chances = self.router(x.to(self.router.weight.dtype)).softmax(-1).to(x.dtype)
        y = sum(chances[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        if self.extra is not None:
            y = y + self.extra.to(x.dtype).sum()
        return y


class Net(nn.Module):
    def __init__(self, extra: nn.Parameter | None = None) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Moe(extra), Moe()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


class Scaled(nn.Parameter):
    """A parameter that carries a number beside its values, as those of quantisation libraries do."""

    scale: float

    def sum(self, *args: Any, **kwargs: Any) -> Any:
        return self.to(torch.float32).as_subclass(torch.Tensor).sum() * self.scale


def with_router(dtype: torch.dtype, frozen: bool = False) -> Net:
    net = Net()
    net.blocks[0].router.to(dtype).requires_grad_(not frozen)
    return net


def with_extra(*shape: int, dtype: torch.dtype = torch.float32, frozen: bool = True) -> Net:
    return Net(nn.Parameter(torch.ones(shape).to(dtype), requires_grad=not frozen))


def tied(leaf: bool) -> Net:
    net = Net()
    if leaf:
        net.blocks[1].router.weight = net.blocks[0].router.weight
    else:
        net.inp.weight = net.blocks[0].experts[0].weight
    return net


def shared_module() -> Net:
    net = Net()
    net.blocks[1].experts[0] = net.blocks[0].experts[0]
    return net


def module_around() -> Net:
    net = Net()
    net.inp = net.blocks[0].experts[0]
    return net


def strided() -> Net:
    return Net(nn.Parameter(torch.ones(3, 2).t()))


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def zero3() -> Net:
    """As ZeRO-3 leaves a parameter behind: without values."""
    net = Net()
    weight = net.blocks[0].experts[1].weight
    weight.ds_id, weight.ds_shape = 0, weight.shape
    weight.data = torch.empty(0)
    return net


def flattened() -> Net:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = Net()
    net.blocks[0] = FullyShardedDataParallel(net.blocks[0], device_id=torch.device("cpu"))
    return net


def lazy() -> Net:
    net = Net()
    net.blocks[0].experts[0] = nn.LazyLinear(WIDTH)
    return net


def on_mesh(world: bool) -> Net:
    """Experts that are DTensors already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    net = Net()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",) if world else ("tp",))
    expert = net.blocks[0].experts[0]
    expert.weight = nn.Parameter(distribute_tensor(expert.weight.detach(), mesh, [Shard(0)]))
    return net


F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
INTEGERS = "" if _torch_version() >= (2, 13) else "leaf 'blocks.0' (Moe): parameter 'blocks.0.extra' is torch."
# What is built, and the start of the error; "" if it passes.
CASES: dict[str, tuple[Callable[[], Net], str]] = {
    "plain": (Net, ""),
    "meta": (on_meta, ""),
    "frozen bf16 router": (lambda: with_router(BF16, frozen=True), ""),
    "frozen uint8": (lambda: with_extra(2, 2, dtype=torch.uint8), INTEGERS),
    "frozen int32": (lambda: with_extra(2, 2, dtype=torch.int32), INTEGERS),
    "frozen float8": (lambda: with_extra(2, 2, dtype=F8), ""),
    "frozen empty": (lambda: with_extra(0, 2), ""),
    "double router": (
        lambda: with_router(torch.float64),
        "leaf 'blocks.0' (Moe) holds trainable parameters of several dtypes, and an FSDP2 unit takes one: 4 are "
        "torch.float32, but 'blocks.0.router.weight' (torch.float64), 'blocks.0.router.bias' (torch.float64): ",
    ),
    "trained float8": (
        lambda: with_extra(2, 2, dtype=F8, frozen=False),
        "leaf 'blocks.0' (Moe): parameter 'blocks.0.extra' is torch.float8_e4m3fn and has a gradient",
    ),
    "scalar": (lambda: with_extra(), "leaf 'blocks.0' (Moe): parameter 'blocks.0.extra' is a scalar"),
    "empty": (lambda: with_extra(0, 2, frozen=False), "leaf 'blocks.0' (Moe): parameter 'blocks.0.extra' is empty"),
    "strided": (strided, "leaf 'blocks.0' (Moe): parameter 'blocks.0.extra' is not contiguous"),
    "lazy": (lazy, "leaf 'blocks.0' (Moe): parameter 'blocks.0.experts.0.weight' has no shape yet"),
    "ZeRO-3": (
        zero3,
        "leaf 'blocks.0' (Moe): parameter 'blocks.0.experts.1.weight' is partitioned by DeepSpeed",
    ),
    "FSDP1": (flattened, "'blocks.0' is wrapped by FSDP1"),
    "other mesh": (
        lambda: on_mesh(False),
        "leaf 'blocks.0' (Moe): parameter 'blocks.0.experts.0.weight' is a DTensor already, (Shard(dim=0),) on a "
        "mesh (2,) ('tp',), and no mesh is given",
    ),
    "same mesh": (lambda: on_mesh(True), "leaf 'blocks.0' (Moe): parameter 'blocks.0.experts.0.weight' is a DTensor"),
    "tied leaves": (
        lambda: tied(True),
        "leaf 'blocks.0' (Moe) and leaf 'blocks.1' (Moe) share a parameter, 'blocks.0.router.weight' = "
        "'blocks.1.router.weight'",
    ),
    "tied around": (
        lambda: tied(False),
        "leaf 'blocks.0' (Moe) and what is around share a parameter, 'blocks.0.experts.0.weight' = 'inp.weight'",
    ),
    "module around": (module_around, "leaf 'blocks.0' (Moe) and what is around share a parameter"),
    "shared module": (shared_module, "leaf 'blocks.0' (Moe) and leaf 'blocks.1' (Moe) share a parameter"),
}


def run_step(net: Net, rank: int) -> None:
    for name, param in net.named_parameters():
        assert not (param.is_meta and "extra" in name)
    if any(param.is_meta for param in net.parameters()):
        net.to_empty(device="cpu")
        for param in net.parameters():
            nn.init.normal_(param, std=0.1)
    x = torch.randn(rank + 1, WIDTH)
    net(x).backward()
    assert all(param.grad is not None for param in net.parameters() if param.requires_grad)


def compare(rank: int, names: list[str]) -> dict[str, tuple[str, str]]:
    """Of each case what this package says, and what torch does."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    seen = {}
    for name in names:
        said, done = "", ""
        net = CASES[name][0]()
        try:
            fully_shard_leaves(net, list(net.blocks))
        except LeafShardError as error:
            said = str(error)
            assert not any(isinstance(part, FSDPModule) for part in net.modules())
        else:
            fully_shard(net)
            run_step(net, rank)
        net = CASES[name][0]()
        try:
            tied_before = len(list(net.parameters()))
            for block in net.blocks:
                fully_shard(block)
            fully_shard(net)
            run_step(net, rank)
            if len(list(net.parameters())) != tied_before:
                done = "untied"
        except Exception as error:
            done = type(error).__name__
        seen[name] = (said, done)
    return seen


def test_what_is_refused_fails_in_torch_and_what_passes_trains() -> None:
    for seen in run_ranks(compare, 2, list(CASES)):
        for name, (_, start) in CASES.items():
            said, done = seen[name]
            assert said.startswith(start), (name, said)
            assert bool(said) == bool(start), (name, said)
            assert bool(done) == bool(start), (name, said, done)


def with_policy(rank: int) -> list[str]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    said = []
    policy = MixedPrecisionPolicy(param_dtype=BF16)
    scaled = Scaled(torch.ones(2, 2).to(torch.uint8), requires_grad=False)
    scaled.scale = 0.5
    for net, options in (
        (with_extra(2, 2, dtype=F8), {"mp_policy": policy}),
        (Net(scaled), {}),
        (Net(), {"mixed_dtypes": "split"}),
    ):
        try:
            fully_shard_leaves(net, list(net.blocks), **options)
        except (LeafShardError, LeafValueError) as error:
            said.append(str(error))
    # What is ignored is not looked at.
    net = with_router(torch.float64)
    fully_shard_leaves(net, list(net.blocks), ignored_params=set(net.blocks[0].router.parameters()))
    return said


def test_quantised_parameters_that_would_lose_something() -> None:
    for cast, scaled, mixed in run_ranks(with_policy, 2):
        assert "is torch.float8_e4m3fn, and mp_policy would cast it to torch.bfloat16" in cast
        assert "'blocks.0.extra' is torch.uint8 in a Scaled, of which FSDP2 keeps the numbers only" in scaled
        assert mixed == 'mixed_dtypes is \'split\': pass "raise" or "separate"'


def two_axes(rank: int) -> tuple[list[str], list[float]]:
    """Tensor parallelism on one axis and FSDP2 on the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x))

    said = []
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Pair())
        parallelize_module(model[1], mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return model

    model = make()
    for wrong in (None, mesh["tp"], init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))):
        try:
            fully_shard_leaves(model, model[1], **({} if wrong is None else {"mesh": wrong}))
        except LeafShardError as error:
            said.append(str(error))
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = model(x).square().mean().item()
    fully_shard_leaves(model, model[1], mesh=mesh["dp"])
    loss = model(x).square().mean()
    loss.backward()
    return said, [expected, loss.item()]


def test_tensor_parallelism_on_another_axis_passes() -> None:
    for said, (expected, found) in run_ranks(two_axes, 2):
        assert found == pytest.approx(expected)
        assert len(said) == 3
        assert "no mesh is given" in said[0]
        assert "is the mesh of fully_shard too" in said[1]
        assert "is not of one mesh with that of fully_shard" in said[2]


class Conditional(Moe):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return x


def make_mixed(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    net = Net()
    for block in net.blocks:
        block.router.to(dtype)
    return net


def separate(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule

    net, dense = make_mixed(), make_mixed()
    units = LeafPlan.apply_fsdp2(plan_leaves(net, classes=Moe), mixed_dtypes="separate", layers=None)
    inner = [name for name, part in net.named_modules() if isinstance(part, FSDPModule)]
    xs = [torch.randn(r + 1, WIDTH, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    net(xs[rank]).backward()
    sum(dense(x) / 2 for x in xs).backward()
    for (name, param), other in zip(net.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), other.grad, msg=name)
    said = []
    odd = make_mixed()
    odd.blocks[0].experts[0].to(torch.float64)
    bare = Net(nn.Parameter(torch.ones(2, dtype=torch.float64)))
    hidden = make_mixed()
    hidden.blocks[0].__class__ = Conditional
    for wrong in (odd, bare, hidden):
        try:
            fully_shard_leaves(wrong, list(wrong.blocks), mixed_dtypes="separate")
        except LeafShardError as error:
            said.append(str(error))
        assert not any(isinstance(part, FSDPModule) for part in wrong.modules())
    return {"units": len(units), "inner": inner, "said": said}


def test_a_router_of_another_dtype_is_a_unit_of_its_own_on_request() -> None:
    for seen in run_ranks(separate, 2):
        assert seen["units"] == 3
        assert seen["inner"] == ["", "blocks.0", "blocks.0.router", "blocks.1", "blocks.1.router"]
        experts, bare, hidden = seen["said"]
        assert "'blocks.0.experts' cannot be a unit of its own: a ModuleList is never called" in experts
        assert "'blocks.0.extra' cannot be a unit of its own: it is a parameter, no child" in bare
        assert "'blocks.0.router' cannot be a unit of its own: Conditional.forward does not show that" in hidden


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("always", "nested", "condition", "loop", "either", "late", "method", "comprehension", "with_"):
            setattr(self, name, nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.nested(x)) + self.always(x)
        self.method.extra_repr()
        with torch.no_grad():
            y = self.with_(y)
        if self.condition(y).sum() > 0:
            y = self.loop(y)
        z = self.either(y) if self.training else y
        w = [self.comprehension(part) for part in (y, z)]
        if not w:
            return y
        return self.late(z)


def test_which_children_a_forward_always_calls() -> None:
    model = Calls()
    assert [name for name, _ in model.named_children() if always_calls(model, name)] == [
        "always",
        "nested",
        "condition",
        "with_",
    ]
    assert not always_calls(nn.Linear(1, 1), "weight")

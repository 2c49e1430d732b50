"""What DeepSpeed makes of models that were built on meta: the values of eager construction, or an error."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "deepspeed"))

import torch
from ds_ondevice import MaterializeError, MetaValueError, OnDevice, UnrestorableError, materialize
from engines import ENV, TIMEOUT, Case, Net, batch, configuration, groups_of
from ranks import run_ranks
from torch import nn

ENGINES = [Case("none"), Case("zero1"), Case("zero2"), Case("zero3"), Case("zero1", "bf16"), Case("zero3", "bf16")]


def eager(build: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return build()


def on_meta() -> nn.Module:
    with OnDevice(torch.float32, device="meta"):
        return Net()


def restored(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    assert materialize(model, "cpu", **options).missing == ()
    return model


def zero_init(case: Case = Case("zero3"), **options: Any) -> Any:  # noqa: B008  (frozen)
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=configuration(case), **options)


def assert_same(found: nn.Module, build: Callable[[], nn.Module] = Net) -> None:
    import deepspeed

    expected = dict(eager(build).named_parameters())
    for name, parameter in found.named_parameters():
        assert type(parameter) is nn.Parameter, name
        with deepspeed.zero.GatheredParameters([parameter]):  # does nothing to whole parameters
            assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    for (name, buffer), theirs in zip(found.named_buffers(), eager(build).buffers(), strict=True):
        assert type(buffer) is torch.Tensor, name
        assert torch.equal(buffer, theirs), name


def engine_of(model: nn.Module, case: Case) -> Any:
    import deepspeed

    adam, config = torch.optim.AdamW(groups_of(model), lr=0.05), configuration(case)
    return deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]


def losses(model: nn.Module, case: Case) -> list[float]:
    engine, found = engine_of(model, case), []
    for step in range(3):
        loss = engine(batch(step, 0, torch.distributed.get_rank()).to(case.lp))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def engine_trains_as_of_eager(case: Case) -> None:
    expected = losses(eager().to(case.lp), case)
    assert losses(restored(on_meta(), dtype=case.lp), case) == expected
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        engine_of(on_meta(), case)


def partitioned_when_materialized() -> None:
    model = restored(on_meta())
    zero_init(module=model)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert_same(model)
    torch.manual_seed(0)
    with zero_init():
        expected = Net()
    assert losses(model, Case("zero3")) == losses(expected, Case("zero3"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        zero_init(module=on_meta())


class Tables(nn.Module):
    """With buffers, which zero.Init leaves alone; a random one is drawn before the parameters."""

    def __init__(self, noise: bool = False, device: str = "cpu") -> None:
        super().__init__()
        self.register_buffer("noise", torch.rand(4) if noise else None)
        self.register_buffer("inv_freq", 1 / torch.arange(1, 5).float(), persistent=False)
        self.register_buffer("slopes", torch.linspace(0, 1, 4))
        self.net = Net()
        with OnDevice(torch.float32, device):
            self.head = nn.Linear(3, 3)


def under_zero_init(noise: bool, order: str, device: str) -> None:
    build = partial(Tables, noise)
    blocks = [zero_init(), OnDevice(torch.float32, device)]
    torch.manual_seed(0)
    with contextlib.suppress(MaterializeError, MetaValueError):  # refused, not done wrongly
        with contextlib.ExitStack() as stack:
            for block in blocks if order == "around" else blocks[::-1]:
                stack.enter_context(block)
            model = build()
        assert all(parameter.numel() == 0 and not parameter.is_meta for parameter in model.parameters())
        assert_same(restored(model), build)


def table_beside_bf16_parameters() -> None:
    with zero_init(Case("zero3", "bf16")), OnDevice(torch.float32, "meta"):
        model: Any = Tables()
    assert torch.equal(restored(model).slopes, torch.linspace(0, 1, 4))


def block_in_a_constructor(device: str) -> None:
    torch.manual_seed(0)
    with zero_init():
        model = Tables(device=device)
    assert_same(model, Tables)


def deepspeed_on_device() -> None:
    import deepspeed

    theirs = deepspeed.OnDevice
    with theirs(dtype=torch.float32, device="meta"):
        model: Any = nn.Linear(3, 3)
    with pytest.raises(UnrestorableError):
        materialize(model, "cpu")
    for outer, inner in ((theirs, OnDevice), (OnDevice, theirs)):
        with outer(dtype=torch.float32, device="meta"), inner(dtype=torch.float32, device="meta"):
            model = Net()
        assert_same(restored(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "OnDevice", OnDevice)
        with deepspeed.OnDevice(dtype=torch.float32, device="meta"):
            model = Net()
    assert_same(restored(model))


def warns_under_zero_init(order: str) -> None:
    """zero.Init makes parameters real at once, and so before noise that was only recorded: they are not eager's."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    blocks = [zero_init(), OnDevice(torch.float32, "meta")]
    logging.getLogger("ds.ondevice").addHandler(handler)
    try:
        with contextlib.ExitStack() as stack:
            for block in blocks if order == "around" else blocks[::-1]:
                stack.enter_context(block)
            Tables(noise=True)
    finally:
        logging.getLogger("ds.ondevice").removeHandler(handler)
    assert sum("were drawn on a real device inside" in text for text in seen) == 1, seen


BLOCKS = [(order, device) for order in ("around", "inside") for device in ("meta", "cpu")]
CASES: dict[str, Callable[[], None]] = {
    **{f"engine {case}": partial(engine_trains_as_of_eager, case) for case in ENGINES},
    "zero.Init of a materialized module": partitioned_when_materialized,
    **{f"zero.Init {order} {device}": partial(under_zero_init, False, order, device) for order, device in BLOCKS},
    **{f"noise, {order} cpu": partial(under_zero_init, True, order, "cpu") for order in ("around", "inside")},
    **{f"noise, {order} meta": partial(warns_under_zero_init, order) for order in ("around", "inside")},
    **{f"block on {device} in a constructor": partial(block_in_a_constructor, device) for device in ("meta", "cpu")},
    # torch's linspace on meta calls torch.empty, which zero.Init has make bf16; on the CPU it does not.
    "table beside bf16 parameters": table_beside_bf16_parameters,
    "deepspeed.OnDevice": deepspeed_on_device,
}


def outcomes(rank: int) -> dict[str, str]:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    found = {}
    for name, case in CASES.items():
        try:
            case()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, str]]:
    return run_ranks(outcomes, 2, timeout=TIMEOUT, env=ENV)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(by_rank: list[dict[str, str]], name: str) -> None:
    problems = "".join(found[name] for found in by_rank)
    assert not problems, problems

"""The forward hook that stands in for torch's own method, without FSDP2."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from ds_z3leaf._unused import _touch_parameters
from torch import nn

Pair = namedtuple("Pair", "index out")


class Two(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.wrap = wrap
        self.register_forward_hook(_touch_parameters)

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.used(x))


WRAPS = {
    "tensor": (lambda out: out, lambda out: out),
    "tuple": (lambda out: (out, None), lambda out: out[0]),
    "list": (lambda out: [torch.tensor(1), out], lambda out: out[1]),
    "dict": (lambda out: {"n": 3, "out": out}, lambda out: out["out"]),
    "nested": (lambda out: ({"aux": torch.zeros(1)}, [out]), lambda out: out[1][0]),
    "namedtuple": (lambda out: Pair(0, out), lambda out: out.out),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_unused_parameters_get_zeros_and_used_ones_their_own(kind: str) -> None:
    wrap, take = WRAPS[kind]
    module = Two(wrap)
    x = torch.randn(5, 3)
    out = module(x)
    assert type(out) is type(wrap(x))
    take(out).square().sum().backward()
    plain = nn.Linear(3, 3)
    plain.load_state_dict(module.used.state_dict())
    plain(x).square().sum().backward()
    torch.testing.assert_close(take(out), plain(x))
    assert torch.equal(module.used.weight.grad, plain.weight.grad)
    assert torch.equal(module.unused.weight.grad, torch.zeros(3, 3))
    assert torch.equal(module.unused.bias.grad, torch.zeros(3))
    assert module.frozen.grad is None


def test_nothing_happens_without_gradients() -> None:
    module = Two(lambda out: out)
    with torch.no_grad():
        assert module(torch.ones(1, 3)).grad_fn is None


def test_an_output_that_cannot_be_followed_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    Two(lambda out: {out})(torch.ones(1, 3))
    assert "Two returns no tensor with a gradient" in caplog.text

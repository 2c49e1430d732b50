"""A leaf's full backward hook runs after the leaf's own backward, however the leaf is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ds_z3leaf._calls import adapt_calls
from ds_z3leaf.errors import LeafShardError
from torch import nn


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Any, scale: torch.Tensor | None = None, *, shift: float = 0.0) -> torch.Tensor:
        out = self.linear(x[0] if isinstance(x, list) else x) + shift
        return out if scale is None else out * scale


def hook_sees_gradient(leaf: Leaf, *args: Any, **kwargs: Any) -> tuple[bool, torch.Tensor]:
    """Whether the weight has its gradient when the leaf's full backward hook runs, and that gradient."""
    seen: list[bool] = []
    handle = leaf.register_full_backward_hook(
        lambda module, inputs, outputs: seen.append(leaf.linear.weight.grad is not None)
    )
    leaf.zero_grad()
    leaf(*args, **kwargs).square().sum().backward()
    handle.remove()
    assert leaf.linear.weight.grad is not None
    return seen == [True], leaf.linear.weight.grad


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "frozen input": ((torch.ones(1, 2),), {}),
    "keyword": ((), {"x": torch.ones(1, 2, requires_grad=True)}),
    "frozen keyword": ((), {"x": torch.ones(1, 2), "scale": torch.full((2,), 3.0), "shift": 1.0}),
    "second input": ((torch.ones(1, 2), torch.ones(2, requires_grad=True)), {"shift": 1.0}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_hook_runs_after_the_backward(name: str) -> None:
    args, kwargs = CALLS[name]
    leaf = Leaf()
    early, expected = hook_sees_gradient(leaf, *args, **kwargs)
    assert early == (name == "second input"), "torch calls the hook early for the others, or this tells nothing"
    handles = adapt_calls(leaf)
    after, found = hook_sees_gradient(leaf, *args, **kwargs)
    assert after
    torch.testing.assert_close(found, expected)
    for handle in handles:
        handle.remove()
    assert not leaf._forward_pre_hooks
    assert not leaf._forward_hooks


def test_what_is_not_trained_is_left_alone() -> None:
    leaf, x = Leaf(), torch.ones(1, 2)
    adapt_calls(leaf)
    with torch.no_grad():
        assert not leaf(x).requires_grad
        leaf([x])
    leaf.requires_grad_(False)
    assert not leaf(x).requires_grad
    assert not x.requires_grad


def test_a_leaf_that_takes_no_tensor_is_refused() -> None:
    leaf = Leaf()
    adapt_calls(leaf)
    with pytest.raises(LeafShardError, match="leaf Leaf is called with no positional tensor of floating point"):
        leaf([torch.ones(1, 2)])


def test_an_output_without_a_gradient_is_refused() -> None:
    class Wrapped(Leaf):
        def forward(self, x: torch.Tensor, way: Any = dict) -> Any:
            return way(out=super().forward(x)) if way is dict else way(super().forward(x))

    leaf = Wrapped()
    adapt_calls(leaf)
    assert leaf(torch.ones(1, 2), lambda out: (1, out))[1].requires_grad
    with pytest.raises(LeafShardError, match="leaf Wrapped returns a dict without a tensor that requires a gradient"):
        leaf(torch.ones(1, 2))
    with pytest.raises(LeafShardError, match="leaf Wrapped returns a Tensor without"):
        leaf(torch.ones(1, 2), torch.Tensor.detach)
    with torch.no_grad():
        leaf(torch.ones(1, 2))

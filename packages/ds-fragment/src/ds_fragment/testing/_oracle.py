"""The same training on one process, dense and in fp64, by means that know nothing of any engine."""

from __future__ import annotations

import torch
from torch.func import functional_call

from ds_fragment.testing._net import BETAS, EPS, LR, batch, loss_of, net


class Oracle:
    """Computes with the data of all ranks at once.

    Args:
        seed: the model's.
        parts: how many data-parallel ranks there are.
        compute: what weights and data are rounded to before each forward pass.
        steps: what the optimizer's count begins at.

    Attributes:
        value: the master weights by name, fp64.
        grad: the mean over the ranks of what piled up since the last step; names that nothing used are missing.
        state: ``exp_avg`` by name; zeros before the first step.
    """

    def __init__(self, seed: int, parts: int, compute: torch.dtype, steps: int = 0) -> None:
        self._net = net(seed).double()
        self._parts, self._compute = parts, compute
        self.value = {name: param.detach().clone() for name, param in self._net.named_parameters()}
        self.grad: dict[str, torch.Tensor] = {}
        self.state = {name: torch.zeros_like(value) for name, value in self.value.items()}
        self._squares = {name: torch.zeros_like(value) for name, value in self.value.items()}
        self._steps = dict.fromkeys(self.value, steps)
        self._leaves: dict[str, torch.Tensor] = {}
        self._loss = torch.zeros(())

    def forward(self, turn: int, *, keep: bool = True) -> list[torch.Tensor]:
        """The outputs for each rank's data; ``keep`` them for the backward pass."""
        leaves = {n: v.to(self._compute).double().requires_grad_() for n, v in self.value.items()}
        data = [batch(turn, part).to(self._compute).double() for part in range(self._parts)]
        outputs = [functional_call(self._net, leaves, (x,)) for x in data]
        if keep:
            self._leaves, self._loss = leaves, torch.stack([loss_of(out) for out in outputs]).mean()
        return [out.detach() for out in outputs]

    def backward(self) -> None:
        """Add the gradients of the last forward pass."""
        found = torch.autograd.grad(self._loss, list(self._leaves.values()), allow_unused=True)
        for name, grad in zip(self._leaves, found, strict=True):
            if grad is not None:
                self.grad[name] = self.grad[name] + grad if name in self.grad else grad

    def step(self) -> None:
        """Adam, after which the gradients are gone."""
        for name, grad in self.grad.items():
            self._steps[name] += 1
            self.state[name] = BETAS[0] * self.state[name] + (1 - BETAS[0]) * grad
            self._squares[name] = BETAS[1] * self._squares[name] + (1 - BETAS[1]) * grad.square()
            mean = self.state[name] / (1 - BETAS[0] ** self._steps[name])
            square = self._squares[name] / (1 - BETAS[1] ** self._steps[name])
            self.value[name] = self.value[name] - LR * mean / (square.sqrt() + EPS)
        self.grad = {}

    def held(self, quantity: str) -> dict[str, torch.Tensor]:
        """The quantity by name: a dict to be read and changed."""
        return {"value": self.value, "grad": self.grad, "state": self.state}[quantity]

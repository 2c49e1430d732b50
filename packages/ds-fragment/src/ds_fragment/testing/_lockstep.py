"""An engine and the oracle, trained side by side; whatever differs on this rank is noted."""

from __future__ import annotations

import contextlib

import torch

from ds_fragment.testing._engine import Engine, Training
from ds_fragment.testing._net import batch, loss_of
from ds_fragment.testing._oracle import Oracle


class Unsupported(Exception):
    """The engine has no such moment, or this environment no such operation."""


class Lockstep:
    """Takes each step of training twice.

    Attributes:
        differences: what came out differently, in words.
        training: the engine's side.
        oracle: what is right.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.training: Training = engine.build(seed)
        self.training.attach()
        self.oracle = Oracle(seed, self.training.data_ranks, engine.compute, engine.idle_steps)
        self.differences: list[str] = []
        self._tolerance = engine.tolerance
        self._turn = 0
        self._outputs: torch.Tensor | None = None

    def close(self, found: torch.Tensor, right: torch.Tensor) -> bool:
        """Whether they are equal up to the engine's tolerance."""
        return found.shape == right.shape and torch.allclose(
            found.detach().double(), right.double(), rtol=self._tolerance, atol=self._tolerance
        )

    def forward(self, when: str) -> None:
        """A forward pass in train mode with new data; a graph of an earlier one is dropped."""
        self._turn += 1
        self._outputs = None
        self._outputs = self.training.forward(batch(self._turn, self.training.data_index))
        self._compare(self._outputs, self.oracle.forward(self._turn), f"{when} forward")

    def drop(self) -> None:
        """Give the last forward pass up."""
        self._outputs = None

    def backward(self) -> None:
        """The backward pass of the last forward pass."""
        assert self._outputs is not None
        self.training.backward(loss_of(self._outputs.float()))
        self._outputs = None
        self.oracle.backward()

    def step(self) -> None:
        """The optimizer's step; the gradients stay as the engine leaves them."""
        self.training.step()
        self.oracle.step()

    def eval_forward(self, when: str) -> None:
        """A forward pass in eval mode with new data."""
        self._turn += 1
        outputs = self.training.eval_forward(batch(self._turn, self.training.data_index))
        self._compare(outputs, self.oracle.forward(self._turn, keep=False), f"{when} eval forward")

    def _compare(self, outputs: torch.Tensor, right: list[torch.Tensor], when: str) -> None:
        if not self.close(outputs, right[self.training.data_index]):
            off = (outputs.detach().double() - right[self.training.data_index]).abs().max().item()
            self.differences.append(f"{when} pass computes with other weights than the oracle (off by {off:.2g})")

    def reach(self, moment: str, stack: contextlib.ExitStack) -> None:
        """Train up to the moment; contexts that it lies in are entered on the stack."""
        if moment == "fresh":
            return
        self.forward("the first")
        self.backward()
        self.step()
        self.training.zero_grad()
        if moment == "no_sync":
            context = self.training.no_sync()
            if context is None:
                raise Unsupported
            stack.enter_context(context)
        self.forward("the second")
        if moment == "forward":
            self.drop()
        if moment in ("backward", "step", "eval", "no_sync"):
            self.backward()
        if moment == "step":
            self.step()
        if moment == "eval":
            self.eval_forward("the first")

    def go_on(self, moment: str, *, redo: bool) -> None:
        """Train on from the moment, after its contexts were left, to see what the operation has done.

        Args:
            moment: where training is.
            redo: give a pending backward pass up, as values were written after its forward pass.
        """
        if moment in ("backward", "eval"):
            self.eval_forward("the next")
        elif moment == "between" and not redo:
            self.backward()
        else:
            if moment == "step":
                self.training.zero_grad()
            self.drop()
            self.forward("the next")
            self.backward()
        self.step()
        self.training.zero_grad()
        self.eval_forward("after the next step the")
        self.forward("after the next step the")
        self.backward()
        self.step()
        self.training.zero_grad()
        self.eval_forward("after two steps the")

"""The cells: which quantity, which operation, at which moment of training; and what is right in each.

Every cell begins with a fresh engine, the same on every rank, and is attached with `ds_fragment.attach`. All moments
but the first come after one whole training step, so that the optimizer has state and old gradients could be mistaken
for new ones.

============  =======================================  ====================  =====================  ===================
moment        what came before                         value                 grad                   state
============  =======================================  ====================  =====================  ===================
``fresh``     nothing                                  as initialized        an error               an error, or zeros
``forward``   a forward pass whose graph is dropped    of the last step      an error               of the last step
``between``   a forward pass; its backward comes next  of the last step      an error               of the last step
``backward``  forward and backward                     of the last step      the mean of the ranks  of the last step
``step``      forward, backward, step                  of this step          an error: consumed     of this step
``eval``      as ``backward``, then a forward pass     of the last step      the mean of the ranks  of the last step
              in eval mode without gradients
``no_sync``   forward and backward under no_sync,      of the last step      an error; the mean     of the last step
              which has not ended                                            where one rank is all
============  =======================================  ====================  =====================  ===================

Any cell may be one `FragmentError` in place of what the table says, of the same class on every rank, and then
nothing has changed. Where the table says "an error", anything else is wrong: there is no gradient, so what is read is
stale, and what is written is lost. A gradient is read and written in fp32, reduced and without a loss scale.

* A *read* is right if it equals the oracle on every rank, has the same bits on all of them, and training goes on as if
  nothing had been read.
* A *write* is right if the same is then read on every rank, bit for bit; all other parameters are what they were; and
  training goes on from it: the next forward pass computes with a written value, the next step uses a written gradient
  or state. Where a value is written between forward and backward, that backward pass is given up.
* A *local write* changes the piece of one rank, where pieces are apart, and nothing beside it.
* A *load* is `load_full` of a safetensors file: values only.

A parameter that no forward pass uses belongs to every model. Its gradient and state are absent, or zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

QUANTITIES = ("value", "grad", "state")
OPERATIONS = ("read one", "read many", "write one", "write many", "local write", "update", "load")
MOMENTS = ("fresh", "forward", "between", "backward", "step", "eval", "no_sync")


@dataclass(frozen=True, order=True)
class Cell:
    """One of the cells; prints as ``value/read one/fresh``."""

    quantity: str
    operation: str
    moment: str

    @property
    def writes(self) -> bool:
        """Whether the operation changes anything."""
        return not self.operation.startswith("read")

    def __str__(self) -> str:
        return f"{self.quantity}/{self.operation}/{self.moment}"


CELLS = tuple(
    Cell(quantity, operation, moment)
    for moment in MOMENTS
    for quantity in QUANTITIES
    for operation in OPERATIONS
    if operation != "load" or quantity == "value"
)

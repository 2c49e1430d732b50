"""The engines that hold a parameter's shards: one adapter and one file for each, found through one list.

[Note: adapter] An adapter answers three questions for one engine: does it hold this parameter; where is a quantity of
the parameter (a `Sharding`: equal on every rank, computed without communication); which piece does this rank hold (a
view, not a copy). It also updates the low-precision weights after a write. A quantity is ``"value"``, ``"grad"``,
``"lp"`` (the weights that the model computes with, which are only read), or the key of an optimizer state.
"""

from ds_fragment.engines.base import Adapter, adapter_of, adapters, held_by, register_adapter
from ds_fragment.engines.deepspeed_unsharded import DeepSpeedUnshardedAdapter
from ds_fragment.engines.dtensor import DTensorAdapter
from ds_fragment.engines.flat import FlatAdapter
from ds_fragment.engines.fsdp1 import Fsdp1Adapter
from ds_fragment.engines.fsdp2 import Fsdp2Adapter
from ds_fragment.engines.plain import PlainAdapter
from ds_fragment.engines.zero import DeepSpeedFlatAdapter
from ds_fragment.engines.zero3 import Zero3Adapter
from ds_fragment.engines.zero_redundancy import ZeroRedundancyAdapter

__all__ = ["Adapter", "adapter_of", "adapters", "held_by", "register_adapter"]

# Asked from the last to the first.
for _adapter in (
    PlainAdapter(),
    ZeroRedundancyAdapter(),
    DTensorAdapter(),
    Fsdp2Adapter(),
    Fsdp1Adapter(),
    DeepSpeedUnshardedAdapter(),
    Zero3Adapter(),
    FlatAdapter(),
    DeepSpeedFlatAdapter(),
):
    register_adapter(_adapter)

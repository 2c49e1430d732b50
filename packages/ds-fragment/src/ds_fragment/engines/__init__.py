"""What holds a parameter's pieces: one file an engine, found through one list.

[Note: adapter] An adapter answers for one engine: is this parameter yours; where is a quantity of it (a `Sharding`: the
same answer on every rank, computed and not communicated); which piece is here (a view, not a copy). And it brings the
low-precision weights up to date after a write. A quantity is ``"value"``, ``"grad"``, ``"lp"`` (the weights
that the model computes with, which are only read), or the key of an optimizer state.
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

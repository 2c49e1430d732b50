"""Start the server that ranks are forked from with everything imported: each rank would import it anew."""

import sys
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for fragment_oracle

IMPORTED = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.nn.parallel", "torch._dynamo", "ds_fragment"]

if hasattr(forkserver, "ensure_running"):
    forkserver.set_forkserver_preload(["torch", "torch.distributed", *IMPORTED])
    forkserver.ensure_running()

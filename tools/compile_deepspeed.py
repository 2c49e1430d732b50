"""Compile the operators that DeepSpeed compiles on its first use on the CPU, so that no test waits for a compiler.

    TORCH_EXTENSIONS_DIR=... DS_ACCELERATOR=cpu python tools/compile_deepspeed.py [BUILDER ...]

A test that is stopped while DeepSpeed compiles leaves a lock behind, and every later test waits for that lock.
"""

from __future__ import annotations

import sys
import time

from deepspeed.accelerator import get_accelerator

# What tests-integration uses: collectives over shared memory, FusedAdam, and NVMe offload (which needs libaio).
BUILDERS = ("ShareMemCommBuilder", "FusedAdamBuilder", "AsyncIOBuilder", "PinMemoryBuilder")


def main(names: tuple[str, ...]) -> None:
    """Compile each operator that this machine can have, and say how long it took."""
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if type(builder).__name__ != name or not builder.is_compatible(verbose=False):
            print(f"{name}: not on this machine")
            continue
        began = time.monotonic()
        builder.load(verbose=False)
        print(f"{name}: compiled in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or BUILDERS)

"""`ds_numa.numactl` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_numa.numactl as _home

sys.modules[__name__] = _home

"""`ds_groups.parallel_state` itself, under the name that it has in `deepspeed.utils`."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("ds_groups.parallel_state")

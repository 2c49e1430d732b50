"""`ds_groups.parallel_state` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_groups.parallel_state as _home

sys.modules[__name__] = _home

"""`ds_fragment.module_utils` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_fragment.module_utils as _home

sys.modules[__name__] = _home

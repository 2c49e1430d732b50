"""`ds_fragment.tensor_fragment` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_fragment.tensor_fragment as _home

sys.modules[__name__] = _home

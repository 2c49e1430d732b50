"""`ds_fragment.mixed_precision_linkage` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_fragment.mixed_precision_linkage as _home

sys.modules[__name__] = _home

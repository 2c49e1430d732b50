"""`ds_fragment.zero_checkpoint.zero_to_fp32` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_fragment.zero_checkpoint.zero_to_fp32 as _home

sys.modules[__name__] = _home

"""`ds_ondevice.init_on_device` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_ondevice.init_on_device as _home

sys.modules[__name__] = _home

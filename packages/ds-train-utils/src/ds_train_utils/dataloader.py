"""`ds_loader.dataloader` itself, beside the modules that have their names in `deepspeed.utils`."""

import sys

import ds_loader.dataloader as _home

sys.modules[__name__] = _home

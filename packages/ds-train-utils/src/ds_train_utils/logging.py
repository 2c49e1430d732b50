"""`ds_logging.logging` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_logging.logging as _home

sys.modules[__name__] = _home

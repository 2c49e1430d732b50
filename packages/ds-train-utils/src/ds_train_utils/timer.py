"""`ds_logging.timer` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_logging.timer as _home

sys.modules[__name__] = _home

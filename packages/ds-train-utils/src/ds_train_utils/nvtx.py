"""`ds_logging.nvtx` itself, under the name that it has in `deepspeed.utils`."""

import sys

import ds_logging.nvtx as _home

sys.modules[__name__] = _home

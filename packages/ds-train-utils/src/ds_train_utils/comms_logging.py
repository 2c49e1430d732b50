"""`ds_logging.comms_logging` itself, under the name that it has in `deepspeed.utils`."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("ds_logging.comms_logging")

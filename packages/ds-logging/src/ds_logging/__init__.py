"""Rank-aware logging, NVTX ranges and a communication log for PyTorch training.

Importing this package prints nothing, adds no handler and imports neither torch nor CUDA. The modules ``logging``,
``comms_logging`` and ``nvtx`` hold every name of the modules of the same name in ``deepspeed.utils``.
"""

from ds_logging.__about__ import __version__
from ds_logging._configure import configure
from ds_logging._handlers import RankFilter
from ds_logging.comms_logging import CommsLogger, get_caller_func
from ds_logging.logging import log_dist, log_dist_once, logger, set_log_level_from_string, warning_once
from ds_logging.nvtx import instrument_w_nvtx

__all__ = [
    "CommsLogger",
    "RankFilter",
    "__version__",
    "configure",
    "get_caller_func",
    "instrument_w_nvtx",
    "log_dist",
    "log_dist_once",
    "logger",
    "set_log_level_from_string",
    "warning_once",
]

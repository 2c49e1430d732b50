"""Rank-aware logging, NVTX ranges and a communication log for PyTorch training.

Importing this package prints nothing, adds no handler and imports neither torch nor CUDA. The modules ``logging``,
``comms_logging``, ``nvtx`` and ``timer`` hold every name of the modules of the same name in ``deepspeed.utils``; their
functions and classes are here, too. The switch ``enable_nvtx`` is not: assign ``ds_logging.nvtx.enable_nvtx``.
"""

from ds_logging import comms_logging, logging, nvtx, timer
from ds_logging.__about__ import __version__
from ds_logging._log.configure import configure
from ds_logging._log.handlers import RankFilter
from ds_logging._step import current_step, set_step
from ds_logging.comms_logging import (
    CommsLogger,
    GroupReport,
    Wait,
    calc_bw_log,
    convert_size,
    get_caller_func,
    print_rank_0,
)
from ds_logging.errors import (
    ArgumentError,
    LogLevelError,
    MissingExtraError,
    RanksError,
    ReadOnlyError,
    TimerError,
    UnknownOperationError,
)
from ds_logging.logging import (
    LoggerFactory,
    get_current_level,
    get_dist_msg,
    get_log_level_from_string,
    log_dist,
    log_dist_once,
    logger,
    print_configuration,
    print_dist,
    print_json_dist,
    set_log_level_from_string,
    should_log_le,
    warning_once,
)
from ds_logging.nvtx import NvtxBackend, instrument_w_nvtx
from ds_logging.timer import CudaEventTimer, NoopTimer, SynchronizedWallClockTimer, ThroughputTimer, trim_mean

__all__ = [
    "ArgumentError",
    "CommsLogger",
    "CudaEventTimer",
    "GroupReport",
    "LogLevelError",
    "LoggerFactory",
    "MissingExtraError",
    "NoopTimer",
    "NvtxBackend",
    "RankFilter",
    "RanksError",
    "ReadOnlyError",
    "SynchronizedWallClockTimer",
    "ThroughputTimer",
    "TimerError",
    "UnknownOperationError",
    "Wait",
    "__version__",
    "calc_bw_log",
    "comms_logging",
    "configure",
    "convert_size",
    "current_step",
    "get_caller_func",
    "get_current_level",
    "get_dist_msg",
    "get_log_level_from_string",
    "instrument_w_nvtx",
    "log_dist",
    "log_dist_once",
    "logger",
    "logging",
    "nvtx",
    "print_configuration",
    "print_dist",
    "print_json_dist",
    "print_rank_0",
    "set_log_level_from_string",
    "set_step",
    "should_log_le",
    "timer",
    "trim_mean",
    "warning_once",
]


def __dir__() -> list[str]:
    """The public names and those with an underscore; not the submodule ``errors``, whose classes are all here."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})

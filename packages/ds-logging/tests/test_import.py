import ast
import importlib
import pkgutil
from pathlib import Path

import ds_logging
import pytest


def test_import_prints_nothing_adds_no_handler_and_imports_no_torch(run_script):
    done = run_script("""
import logging, sys
root_before = (logging.root.level, list(logging.root.handlers))
import ds_logging, ds_logging.comms_logging, ds_logging.nvtx, ds_logging.timer, ds_logging.errors
assert (logging.root.level, logging.root.handlers) == root_before
assert logging.getLogger("ds").handlers == []
assert logging.getLogger("ds").level == logging.NOTSET
assert logging.getLogger("ds").propagate
loaded = {"torch", "numpy", "rich", "nvtx", "deepspeed"} & set(sys.modules)
assert not loaded, loaded
""")
    assert (done.stdout, done.stderr) == ("", "")


def test_every_exported_name_exists():
    for name in ds_logging.__all__:
        assert getattr(ds_logging, name) is not None


def test_dir_has_the_public_names_and_nothing_else_without_an_underscore():
    for module in pkgutil.walk_packages(ds_logging.__path__, "ds_logging."):
        importlib.import_module(module.name)
    assert [name for name in dir(ds_logging) if not name.startswith("_")] == sorted(
        set(ds_logging.__all__) - {"__version__"}
    )
    assert {"__version__", "__file__", "__doc__", "_rank"} <= set(dir(ds_logging))


@pytest.mark.parametrize("module", ["logging", "comms_logging", "nvtx", "timer", "errors"])
def test_every_public_function_and_class_is_at_the_top(module):
    home = importlib.import_module(f"ds_logging.{module}")
    defined = [name for name in home.__all__ if callable(getattr(home, name))]
    assert defined
    for name in defined:
        assert name in ds_logging.__all__
        assert getattr(ds_logging, name) is getattr(home, name)


def test_the_modules_are_at_the_top_and_the_switch_is_not():
    for module in ("logging", "comms_logging", "nvtx", "timer"):
        assert module in ds_logging.__all__
        assert getattr(ds_logging, module) is importlib.import_module(f"ds_logging.{module}")
    assert not hasattr(ds_logging, "enable_nvtx")  # a copy that switches nothing


def test_every_error_class_is_listed():
    from ds_logging import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == set(errors.__all__)


# The names and parameters that callers of deepspeed.utils.<module> rely on. `log_dist(message, ranks, level)`, by
# position, goes through *args; see test_logging.py.
CONTRACT = {
    "logging": {
        "warning_once": "*args **kwargs",
        "print_configuration": "args name",
        "get_dist_msg": "message ranks=None",
        "log_dist": "message *args",
        "print_dist": "message ranks=None",
        "log_dist_once": "message *args",
        "print_json_dist": "message ranks=None path=None",
        "get_log_level_from_string": "log_level_str",
        "set_log_level_from_string": "log_level_str custom_logger=None",
        "get_current_level": "",
        "should_log_le": "max_log_level_str",
        "LoggerFactory.create_logger": "name=None level=30",
    },
    "comms_logging": {
        "get_caller_func": "frame=3",
        "print_rank_0": "message",
        "convert_size": "size_bytes",
        "calc_bw_log": "comm_op size duration",
        "CommsLogger": "",
        "CommsLogger.configure": "self comms_config",
        "CommsLogger.start_profiling_comms": "self",
        "CommsLogger.stop_profiling_comms": "self",
        "CommsLogger.start_profiling_op": "self op_name_list",
        "CommsLogger.stop_profiling_op": "self op_name_list",
        "CommsLogger.append": "self raw_name record_name latency msg_size",
        "CommsLogger.get_raw_data": "self",
        "CommsLogger.has_data": "self",
        "CommsLogger.reset_data": "self",
        "CommsLogger.get_operation_names": "self",
        "CommsLogger.get_total_operations": "self",
        "CommsLogger.get_operation_summary": "self operation_name",
        "CommsLogger.log_all": "self print_log=True show_straggler=False return_dict=False",
    },
    "nvtx": {"instrument_w_nvtx": "func"},
    "timer": {
        "CudaEventTimer": "start_event end_event",
        "SynchronizedWallClockTimer": "",
        "SynchronizedWallClockTimer.Timer.start": "self",
        "SynchronizedWallClockTimer.Timer.stop": "self reset=False record=False",
        "SynchronizedWallClockTimer.Timer.elapsed": "self reset=True",
        "SynchronizedWallClockTimer.log": "self names normalizer=1.0 reset=True memory_breakdown=False ranks=None",
        "SynchronizedWallClockTimer.get_mean": "self names normalizer=1.0 reset=True",
        "ThroughputTimer": "config batch_size start_step=2 steps_per_output=None monitor_memory=False logging_fn=None",
        "ThroughputTimer.stop": "self global_step=False report_speed=True",
        "trim_mean": "data trim_percent",
    },
}


def positional(function):
    import inspect

    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        yield f"{prefix}{parameter.name}{default}"


@pytest.mark.parametrize(
    ("module", "name", "wanted"),
    [(module, name, wanted) for module, names in CONTRACT.items() for name, wanted in names.items()],
)
def test_deepspeed_names_have_the_same_parameters(module, name, wanted):
    found = importlib.import_module(f"ds_logging.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    names = " ".join(positional(found))
    assert names.replace("func=None", "func") == wanted  # func may be left out, to decorate with arguments


def test_the_logger_has_the_two_extra_functions():
    assert ds_logging.logger.warning_once is ds_logging.warning_once
    assert ds_logging.logger.log_dist_once is ds_logging.log_dist_once


def test_no_module_imports_another_distribution_or_torch_when_loaded():
    root = Path(ds_logging.__file__).parent
    modules = sorted(root.rglob("*.py"))
    assert len(modules) > 50
    for module in modules:
        tree = ast.parse(module.read_text())
        imported = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert not {name for name in imported if name.startswith("ds_")} - {"ds_logging"}
        assert not imported & {"torch", "rich", "nvtx"}

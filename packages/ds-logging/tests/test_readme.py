import importlib
import inspect
import re
from pathlib import Path

import ds_logging
import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(run_script):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    done = run_script("\n".join(blocks))
    assert "[Rank 0] starting" in done.stderr
    assert done.stdout == ""


def reference():
    return README.read_text().partition("\n## Reference\n")[2]


@pytest.mark.parametrize("module", ["", ".logging", ".comms_logging", ".nvtx", ".timer"])
def test_the_reference_has_every_public_name(module):
    names = set(importlib.import_module(f"ds_logging{module}").__all__) - {"__version__"}
    assert names
    assert names <= set(re.findall(r"\w+", reference()))


PARAMETERS = re.findall(r"`(\w+)\(([^`)]*)\)`", reference())


@pytest.mark.parametrize(("name", "given"), PARAMETERS, ids=[name for name, _ in PARAMETERS])
def test_the_reference_has_the_parameters_of(name, given):
    parameters = inspect.signature(getattr(ds_logging, name)).parameters.values()
    assert given.replace("*, ", "").replace("*", "").split(", ") == [each.name for each in parameters] or not given
    keyword_only = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert given.partition("*, ")[2].split(", ") == (keyword_only or [""]) or "*args" in given


# What importing DeepSpeed 0.19 makes: its logger does not propagate, and its handler has a level of its own.
DEEPSPEEDS_LOGGER = """
import logging, sys

engine = logging.getLogger("DeepSpeed")
engine.setLevel(logging.WARNING)
engine.propagate = False
engine_handler = logging.StreamHandler(stream=sys.stdout)
engine_handler.setLevel(logging.WARNING)
engine.addHandler(engine_handler)
"""


def block_under(heading):
    section = README.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return block


def test_with_deepspeed_as_the_engine_the_block_sets_both_levels(run_script):
    block = block_under("With DeepSpeed as the engine")
    done = run_script(f"{DEEPSPEEDS_LOGGER}{block}\nengine.info('theirs')\nlogging.getLogger('ds').debug('no')\n")
    assert done.stdout == "theirs\n"
    assert "no" not in done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "ds_logging.logger.setLevel('DEBUG')",
        "ds_logging.set_log_level_from_string('debug')",
        "ds_logging.configure('debug')",
        "logging.basicConfig(level='DEBUG', force=True)",
        "ds_logging.set_log_level_from_string('debug', engine)",  # its handler drops the record
    ],
)
def test_with_deepspeed_as_the_engine_nothing_else_of_ours_shows_its_records(run_script, call):
    lines = f"import ds_logging\n{call}\nengine.info('theirs')\nengine.warning('a warning')\n"
    done = run_script(DEEPSPEEDS_LOGGER + lines, DS_LOG_LEVEL="debug")
    assert done.stdout == "a warning\n"
    assert "theirs" not in done.stderr

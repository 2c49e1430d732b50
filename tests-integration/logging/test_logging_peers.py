"""Each record is shown exactly once, in whatever order the application, its libraries and this package log."""

import os
import re
import subprocess
import sys

import pytest

SETUPS = {
    "nothing": "",
    "configure": "import ds_logging; ds_logging.configure('info')",
    "configure on stdout": "import ds_logging, sys; ds_logging.configure('info', stream=sys.stdout)",
    "basicConfig": "import logging; logging.basicConfig(level='INFO')",
    "basicConfig on stdout": "import logging, sys; logging.basicConfig(level='INFO', stream=sys.stdout)",
    "a root handler for errors": """
import logging
handler = logging.StreamHandler()
handler.setLevel('ERROR')
logging.getLogger().addHandler(handler)
""",
    "a NullHandler": "import logging; logging.getLogger().addHandler(logging.NullHandler())",
    "a filter": """
import logging
handler = logging.StreamHandler()
handler.addFilter(lambda record: record.levelno >= logging.WARNING)
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel('INFO')
""",
    "dictConfig": """
import logging.config
logging.config.dictConfig({
    'version': 1,
    'handlers': {'console': {'class': 'logging.StreamHandler'}},
    'root': {'handlers': ['console'], 'level': 'INFO'},
})
""",
    "a handler on ds": """
import logging
logging.getLogger('ds').addHandler(logging.StreamHandler())
logging.getLogger('ds').setLevel('INFO')
""",
    "an intercepting handler": """
import logging, sys
class Intercept(logging.Handler):
    def emit(self, record):
        print('theirs', record.getMessage(), file=sys.stderr)
logging.basicConfig(handlers=[Intercept()], level=0, force=True)
""",
    "rich": """
import logging
from rich.logging import RichHandler
logging.basicConfig(level='INFO', format='%(message)s', handlers=[RichHandler()])
""",
    "transformers": """
import transformers
transformers.logging.set_verbosity_info()
transformers.logging.enable_default_handler()
""",
    "lightning": "import lightning",
    "loguru": """
import logging
from loguru import logger as loguru_logger
class Intercept(logging.Handler):
    def emit(self, record):
        loguru_logger.log(record.levelname, record.getMessage())
logging.basicConfig(handlers=[Intercept()], level=0, force=True)
""",
}
LOG = """
from ds_logging import log_dist, logger, warning_once
import logging
{children}
log_dist('line-{n}-a')
logger.info('line-{n}-b')
logger.warning('line-{n}-c')
warning_once('line-{n}-d')
logging.getLogger('ds.groups').error('line-{n}-e')
"""
NEEDS = {"rich": "rich", "transformers": "transformers", "lightning": "lightning", "loguru": "loguru"}
OURS = ("nothing", "configure", "configure on stdout")
# An application that adds two handlers of its own shows a line twice: at most one of the two is the application.
ORDERS = [(first, second) for first in SETUPS for second in SETUPS if first != second and {first, second} & {*OURS}]
SLOW = ("transformers", "lightning")
ORDERS = [(one, other) for one, other in ORDERS if other not in SLOW and (one not in SLOW or other == "configure")]


def missing(*names):
    import importlib.util

    return [NEEDS[name] for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]


@pytest.mark.parametrize("first", SETUPS)
def test_each_record_is_shown_exactly_once_in_any_order_of_configuration(first, tmp_path):
    if missing(first):
        pytest.skip(f"{missing(first)} is not installed")
    for second in [second for one, second in ORDERS if one == first and not missing(second)]:
        code = SETUPS[first] + LOG.format(n=1, children="") + SETUPS[second] + LOG.format(n=2, children="")
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "COLUMNS": "200", "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 0, (second, done.stderr)
        seen = re.findall(r"line-\d-[a-e]", done.stdout + done.stderr)
        wanted = [f"line-{n}-{letter}" for n in (1, 2) for letter in "abcde"]
        if "dictConfig" in (first, second):  # disable_existing_loggers: the application turned a child off
            wanted, seen = ([line for line in lines if line != "line-2-e"] for lines in (wanted, seen))
        assert sorted(seen) == sorted(wanted), (first, second, done.stdout, done.stderr)

"""Bind this rank when its interpreter starts. ``ds-numa run -- LAUNCHER`` puts this folder first on ``PYTHONPATH``.

Python imports the first module of this name that it finds, so this one imports the next afterwards.
"""

import os
import sys


def _bind() -> None:
    try:
        from ds_numa._run import bind_started_rank
    except ImportError as error:
        sys.stderr.write(
            f"ds-numa: {sys.executable} is not bound: it cannot import ds_numa ({error}): install it there\n"
        )
    else:
        bind_started_rank()


def _load_the_next() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise


_bind()
_load_the_next()

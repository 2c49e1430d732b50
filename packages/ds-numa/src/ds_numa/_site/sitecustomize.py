"""Bind this rank when its interpreter starts. ``ds-numa run -- LAUNCHER`` puts this folder first on ``PYTHONPATH``.

Python imports the first module of this name that it finds, so this one imports the next afterwards. Every Python
process below the launcher comes here, so one that is no rank must pay nothing: ds_numa is imported for ranks alone.
"""

import os
import sys

# A launcher sets one of these in its ranks: what the table of launchers lists (a test compares them).
_RANKS = (
    "LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PALS_LOCAL_RANKID",
    "ALPS_APP_PE",
    "PMIX_RANK",
    "FLUX_TASK_LOCAL_ID",
    "SLURM_LOCALID",
)


def _bind() -> None:
    if "DS_NUMA_RUN" not in os.environ or not any(name in os.environ for name in _RANKS):
        return
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
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ModuleNotFoundError as error:
        sys.modules["sitecustomize"] = this  # the import of this module, which is under way, looks for it
        if error.name != "sitecustomize":
            raise


_bind()
_load_the_next()

"""The environment variables in which launchers say which rank a process is. Only data.

Source: this file of ds-logging. ``tools/copy_launchers.py`` copies it to the distributions that it names; edit it here.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LAUNCHERS", "Launcher"]


class Launcher(NamedTuple):
    """The variables of one launcher; ``None`` where it sets none that can be relied on.

    ``node`` and ``nodes`` number the machines, for launchers that give the local sizes of all machines in one variable
    or none at all. ``other_local_size`` is a second name of ``local_size``.
    """

    name: str
    rank: str
    size: str | None
    local_rank: str | None
    local_size: str | None
    node: str | None = None
    nodes: str | None = None
    other_local_size: str | None = None


# The first whose rank is set wins. What a launcher inside another one sets must stand before what it inherits: MPI
# stands before Flux and Slurm, because `mpirun` inside a batch job inherits SLURM_PROCID=0 in every process of the
# first node. torchrun's names stand first: torchrun runs inside every other launcher.
# Lightning's NODE_RANK is no rank of a process. Ray Train and SageMaker set torchrun's or Open MPI's names.
LAUNCHERS: tuple[Launcher, ...] = (
    # DeepSpeed's launch.py sets LOCAL_SIZE. Lightning sets LOCAL_RANK and WORLD_SIZE, and no local size.
    Launcher(
        "torchrun, accelerate, deepspeed",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        other_local_size="LOCAL_SIZE",
    ),
    Launcher("Horovod", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    Launcher(
        "Open MPI, IBM Spectrum MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "IBM JSM (jsrun)",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Launcher("MPICH, Intel MPI (hydra)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("PALS", "PALS_RANKID", None, "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    Launcher("Cray ALPS", "ALPS_APP_PE", None, None, None),
    Launcher("PMIx", "PMIX_RANK", None, None, None),
    Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", None, nodes="FLUX_JOB_NNODES"),
    # SLURM_NTASKS describes the job, also in a process that srun did not start; SLURM_STEP_NUM_TASKS is srun's own.
    # SLURM_STEP_TASKS_PER_NODE is written "4", "4(x2)" or, where the nodes differ, "4(x2),3": by SLURM_NODEID.
    Launcher(
        "Slurm",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        node="SLURM_NODEID",
        nodes="SLURM_STEP_NUM_NODES",
    ),
)

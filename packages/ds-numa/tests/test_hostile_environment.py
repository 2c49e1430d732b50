"""Whatever stands in a launcher's variables, finding the rank and weighing the mask never raises."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from ds_numa import Topology
from ds_numa._given_mask import find_given_mask
from ds_numa._launcher import find_rank
from ds_numa._launchers import LAUNCHERS

NAMES = sorted(
    {name for launcher in LAUNCHERS for name in launcher[1:] if name}
    | {"SLURM_CPU_BIND", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_LIST", "SLURM_CPUS_PER_TASK"}
)
VALUES = [
    *(
        "0",
        "1",
        "2",
        "3",
        "4",
        "8",
        "0",
        "1",
        "2",
        "4",
        "",
        " 1 ",
        "-1",
        "1.5",
        "x",
        "0x1",
        "010",
        "9" * 6000,
        "9999999",
        "²",
        "٣",
    ),
    *("4(x2)", "4(x2),3", "4,3", "(x2)", "4(x0)", "4(x99999)", ",", "0,4", "4(x2", "\ud800"),
    *("mask_cpu:", "map_cpu", "quiet,mask_cpu:0xF,0xF0", "quiet,map_cpu:010,1", "mask_cpu:0x", "map_cpu:1*0", "none"),
    *("0xF*2,0xF0", "0x" + "F" * 3000, "mask_cpu:*", "verbose,mask_cpu:0xFF00,,0x1"),
]
SRUN = {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4"}  # so that the values about masks are read, too
MACHINE = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}}})


@pytest.mark.parametrize("seed", range(40))
def test_no_environment_raises(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    for _ in range(250):
        env = {name: dice.choice(VALUES) for name in dice.sample(NAMES, dice.randint(1, 12))}
        if dice.random() < 0.5:
            env = {name: value for name, value in env.items() if "CPU" in name} | SRUN
            env["SLURM_CPU_BIND"] = dice.choice(VALUES)
        found = find_rank(env, None, None)
        rank, ranks = found.local_rank, found.num_local_procs
        assert (found.problem is None) == (rank is not None and ranks is not None and rank < ranks), env
        if found.problem is not None or rank is None or ranks is None:
            continue
        mask = sorted(dice.sample(range(8), dice.randint(1, 8)))
        given = find_given_mask(env, MACHINE, mask, rank, ranks, root=tmp_path)
        if given is not None and given.index is not None:
            assert given.sharers is not None
            assert 0 <= given.index < given.sharers < ranks

from __future__ import annotations

import pytest
from ds_numa._commands import starts_launcher


@pytest.mark.parametrize(
    "command",
    [
        "torchrun train.py",
        "/opt/venv/bin/torchrun --nproc-per-node 8 train.py",
        "mpiexec.hydra -n 4 ./train",
        "python -m torch.distributed.run train.py",
        "python3.12 -u -X faulthandler -m accelerate.commands.launch train.py",
        "/usr/bin/python3 /opt/venv/bin/torchrun train.py",
        "env -u A X=1 torchrun train.py",
        "uv run --with x torchrun train.py",
        "poetry run python -m torch.distributed.run train.py",
        "numactl -C 0-7 timeout 60 deepspeed train.py",
        "ds-numa run --ranks 2 -- torchrun train.py",
        "bash -lc|cd /data && exec torchrun train.py",
        "sh -c|if true; then mpirun -np 2 ./train; fi",
    ],
)
def test_commands_that_start_ranks(command: str) -> None:
    words, _, script = command.partition("|")
    assert starts_launcher([*words.split(), *([script] if script else [])])


@pytest.mark.parametrize(
    "command",
    [
        "python train.py",
        "python train.py --launcher torchrun",
        "python -m train mpirun",
        "python -c|import torchrun",
        "python",
        "python -W error train.py",
        "./train --data /data/ds",
        "uv run python train.py torchrun",
        "bash -c|python train.py 'torchrun",
        "bash train.sh torchrun",
        "pythonize torchrun",
    ],
)
def test_commands_that_start_none(command: str) -> None:
    words, _, script = command.partition("|")
    assert not starts_launcher([*words.split(), *([script] if script else [])])

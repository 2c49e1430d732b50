"""The README's examples run as they stand."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import ds_fragment
import pytest
import torch.distributed as dist
from ds_fragment import tensor_fragment
from ranks import run_ranks

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks()[0])
    assert capsys.readouterr().out.splitlines()[0] == "0.weight (16, 8)"
    assert set(names["gradient_norms"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert names["model"][0].weight.equal(names["value"] * 0.5)


def _under_torchrun(rank: int) -> list[str]:
    made, dist.init_process_group = dist.init_process_group, lambda backend: None  # made already
    ended, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(blocks()[1])
    dist.init_process_group, dist.destroy_process_group = made, ended
    return printed.getvalue().splitlines()


def test_two_ranks() -> None:
    first, second = run_ranks(_under_torchrun, 2)
    assert [line.replace("rank 0", "rank 1") for line in first[:3]] == second  # the same gradients on both
    assert len(set(second)) == 3
    assert "flat partition" in first[5]
    assert first[-1] == "{'0.weight': (16, 8), '0.bias': (16,), '2.weight': (1, 16), '2.bias': (1,)}"


def test_every_block_is_run() -> None:
    assert len(blocks()) == 2


def test_every_public_name_is_in_the_reference() -> None:
    text = README.read_text()
    reference = text[text.index("## Reference") :]
    for name in ds_fragment.__all__:
        assert name.startswith("__") or f"`{name}" in reference, name
    porting = text[text.index("## From deepspeed.utils") : text.index("## Reference")]
    families = ("safe_set_full_", "safe_get_local_", "safe_set_local_")
    for name in tensor_fragment.__all__:
        # The three siblings of get_full_hp_param are named by it.
        known = name.startswith(families) or name.endswith(("hp_param", "hp_grad")) or name in porting
        assert known, name

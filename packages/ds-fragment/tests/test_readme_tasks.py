"""The README's sections on single tasks: their examples give what stands there, on one rank and on two."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import torch
from ds_fragment import attach
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

README = Path(__file__).parents[1] / "README.md"


def tasks() -> str:
    """The examples of all sections, one after the other."""
    return "\n".join(re.findall(r"^```pycon\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL))


def first_example() -> str:
    found = re.search(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def failures(names: dict[str, Any]) -> str:
    """What doctest reports of the examples; empty where all is as it stands there."""
    test = doctest.DocTestParser().get_doctest(tasks(), names, "README", str(README), 0)
    assert len(test.examples) > 15
    reported = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(test, out=reported.write)
    return reported.getvalue()


def test_on_one_rank(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__", "folder": tmp_path}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(first_example(), str(README), "exec"), names)
    assert failures(names) == ""


def _sharded(rank: int, folder: str) -> str:
    names: dict[str, Any] = {"__name__": "__main__", "folder": Path(folder)}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer)
    exec(compile(_imports(first_example()), str(README), "exec"), names)
    names.update(model=model, optimizer=optimizer)
    return failures(names)


def _imports(code: str) -> str:
    """Everything before the first line that makes something."""
    return code[: code.index("\nmodel = ")]


def test_on_two_ranks(tmp_path: Path) -> None:
    assert run_ranks(_sharded, 2, str(tmp_path)) == ["", ""]

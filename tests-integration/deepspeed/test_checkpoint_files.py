"""A checkpoint that DeepSpeed wrote holds `fragment_address` objects; the lines of the porting page open it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import torch
from ds_fragment.tensor_fragment import fragment_address, tensor_fragment
from engines import ENV, TIMEOUT, Case, make_engine, train
from ranks import run_ranks

THEIRS = "deepspeed.utils.tensor_fragment"


def write(rank: int, folder: str) -> None:
    engine = make_engine(Case("zero1", "bf16"))
    train(engine, 0)
    engine.save_checkpoint(folder, tag="it")
    engine.destroy()


def addresses(value: Any) -> list[fragment_address]:
    if isinstance(value, dict):
        return [found for item in value.values() for found in addresses(item)]
    if isinstance(value, list | tuple):
        return [found for item in value for found in addresses(item)]
    return [value] if isinstance(value, fragment_address) else []


def read(rank: int, file: str) -> None:
    """In a process that has not imported DeepSpeed's module."""
    named = [(kind, f"{THEIRS}.{kind.__name__}") for kind in (fragment_address, tensor_fragment)]
    with torch.serialization.safe_globals(named):
        others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    assert not any(name.startswith(THEIRS) for name in others), others
    with torch.serialization.safe_globals([*named, *((object_of(name), name) for name in others)]):
        found = addresses(torch.load(file, weights_only=True))
    assert found
    assert all(type(address) is fragment_address and address.numel > 0 <= address.start for address in found)


def object_of(name: str) -> Any:
    """What else the file names, from where it is."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_a_checkpoint_of_deepspeed_opens(tmp_path: Path) -> None:
    run_ranks(write, 2, str(tmp_path), env=ENV, timeout=TIMEOUT)
    files = sorted((tmp_path / "it").glob("*optim_states.pt"))
    assert len(files) == 2
    for file in files:
        run_ranks(read, 1, str(file), env=ENV, timeout=TIMEOUT, init=False)

"""Nothing is kept alive, and no reference cycle waits for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ds_fragment import FlatPartition, attach, iter_full, load_full, save_full, set_many
from ds_fragment.collective.plan import Plan
from ds_fragment.errors import UnlinkedParameterError
from ds_fragment.tensor_fragment import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from fragment_oracle import ragged, set_gradients
from ranks import run_ranks
from torch import nn


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def used(model: nn.Module) -> FlatPartition:
    """A partition whose every way of reading and writing was gone through once."""
    partition = FlatPartition(model.parameters())
    set_gradients(partition.params, seed=0)
    partition.reduce_gradients()
    dict(iter_full(model))
    dict(iter_full(partition.params, "grad"))
    set_many([(param, torch.zeros(param.shape)) for param in partition.params])
    partition.publish()
    return partition


def _partition_dies(rank: int) -> None:
    model = ragged(torch.bfloat16)
    with no_collector():
        partition = used(model)
        gone = [weakref.ref(partition), weakref.ref(partition.hp_param), weakref.ref(partition._gradients)]
        memory = weakref.ref(partition.hp_param.untyped_storage())
        del partition
        assert [ref() for ref in gone] == [None] * 3
        assert memory() is None
        with pytest.raises(UnlinkedParameterError, match="was deleted"):
            safe_get_full_fp32_param(model.weight)
        with pytest.raises(UnlinkedParameterError, match="was deleted"):
            safe_get_full_grad(model.weight)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_flat_memory_goes_with_the_partition(ranks: int) -> None:
    run_ranks(_partition_dies, ranks)


def _optimizer_dies(rank: int) -> None:
    model = ragged(torch.bfloat16)
    partition = used(model)
    optimizer = torch.optim.AdamW([partition.hp_param])
    attach(model, optimizer)
    set_gradients(partition.params, seed=0)
    partition.reduce_gradients()
    optimizer.step()
    partition.publish()
    dict(iter_full(partition.params, "exp_avg"))
    safe_get_full_optimizer_state(model.weight, "step")
    moment, flat = weakref.ref(optimizer.state[partition.hp_param]["exp_avg"]), weakref.ref(partition.hp_param)
    del optimizer, partition
    gc.collect()  # torch's optimizers are in cycles of their own
    assert moment() is None
    assert flat() is None


def test_the_state_goes_with_the_optimizer() -> None:
    run_ranks(_optimizer_dies, 2)


def _model_dies(rank: int, folder: str) -> None:
    with no_collector():
        model = ragged(torch.bfloat16)
        partition = used(model)
        attach(model)
        path = Path(folder, "m.safetensors")
        for background in (False, True):
            saving = save_full(model, path, background=background)
        saving.wait()
        load_full(model, path)
        gone = [weakref.ref(param) for param in model.parameters()]
        del model, partition
        assert [ref() for ref in gone] == [None] * len(gone)


def test_a_linked_and_read_model_is_in_no_cycle(tmp_path: Path) -> None:
    run_ranks(_model_dies, 2, str(tmp_path))


def test_a_linked_parameter_alone_keeps_neither_partition_nor_siblings() -> None:
    with no_collector():
        model = ragged(torch.bfloat16)
        partition = used(model)
        weight = model.weight
        flat, sibling = weakref.ref(partition.hp_param), weakref.ref(model.long)
        del model, partition
        assert flat() is None
        assert sibling() is None
    with pytest.raises(UnlinkedParameterError):
        safe_get_full_fp32_param(weight)


def test_a_partition_that_is_linked_anew_goes_at_once() -> None:
    model = ragged(torch.bfloat16)
    with no_collector():
        first = used(model)
        flat = weakref.ref(first.hp_param)
        first = used(model)
        assert flat() is None
        assert safe_get_full_fp32_param(model.weight).shape == (5, 3)
    first.unlink()


def _plans(rank: int) -> None:
    """Nothing but the parameter keeps what was found out of it: no plan outlives its call."""
    model = ragged(torch.bfloat16)
    partition = used(model)
    for bucket_bytes in range(1, 40):
        dict(iter_full(partition.params, bucket_bytes=bucket_bytes))
    gc.collect()
    assert not any(isinstance(thing, Plan) for thing in gc.get_objects())
    weight = weakref.ref(model.weight)
    with no_collector():
        del model, partition
        assert weight() is None


def test_no_plan_outlives_its_call() -> None:
    run_ranks(_plans, 2)


def test_a_reader_that_is_dropped_holds_nothing() -> None:
    with no_collector():
        param = nn.Parameter(torch.zeros(3))
        reader = iter_full([param, nn.Parameter(torch.zeros(2))])
        next(reader)
        gone = weakref.ref(param)
        del param, reader
        assert gone() is None

"""A topology with the functions of Megatron's ``mpu`` (``megatron.core.parallel_state``), as DeepSpeed calls them too.

[Note: model parallel] Megatron's and DeepSpeed's *model parallel* group is all ranks that share one copy of the model:
tensor and pipeline parallel ranks together. Without a pipeline it is the tensor parallel group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ._collection import expert_data_axis, group_along, known_axis

if TYPE_CHECKING:
    import torch.distributed as dist

    from ._bound import BoundTopology

Axis = tuple[str, ...]

# What stands between `get_` and `_group`, `_world_size`, `_rank` and `_group_ranks`.
_AXES: dict[str, Axis] = {
    "tensor_model_parallel": ("tp",),
    "slice_parallel": ("tp",),
    "pipeline_model_parallel": ("pp",),
    "pipe_parallel": ("pp",),
    "model_parallel": ("tp", "pp"),
    "context_parallel": ("cp",),
    "tensor_and_context_parallel": ("tp", "cp"),
    "expert_model_parallel": ("ep",),
    "expert_tensor_parallel": ("etp",),
    "expert_tensor_and_model_parallel": ("etp", "ep"),
    "expert_tensor_model_pipeline_parallel": ("etp", "ep", "pp"),
}
# DeepSpeed takes their presence for Ulysses sequence parallelism.
_SEQUENCE_AXES: dict[str, Axis] = {
    "sequence_parallel": ("cp",),
    "sequence_data_parallel": ("dp", "cp"),
}
_DATA: Axis = ("dp",)
_DATA_AND_CONTEXT: Axis = ("dp", "cp")


class ModelParallelUnit:
    """The ``mpu`` of a topology: for ``deepspeed.initialize(mpu=...)``, or to set as ``parallel_state.mpu``.

    It has ``get_X_group()``, ``get_X_world_size()``, ``get_X_rank()`` and ``get_X_group_ranks()`` for every X of
    Megatron and DeepSpeed: ``tensor_model_parallel``, ``pipeline_model_parallel``, ``model_parallel``,
    ``data_parallel``, ``context_parallel``, ``expert_model_parallel`` and so on; ``dir()`` lists them. Those of
    ``sequence_parallel`` are there only where the plan has a ``cp`` axis of more than one rank.

    Sizes and ranks are arithmetic. A ``..._group()`` makes the group where there is none yet: its members must all
    call. An axis that the plan does not know is one of one rank.
    """

    def __init__(self, bound: BoundTopology) -> None:
        self._bound = bound
        axes = dict(_AXES)
        if self._size(("cp",)) > 1:
            axes.update(_SEQUENCE_AXES)
        self._getters: dict[str, Callable[..., Any]] = {}
        for name, axis in axes.items():
            self._getters[f"get_{name}_group"] = partial(self._group, axis)
            self._getters[f"get_{name}_world_size"] = partial(self._size, axis)
            self._getters[f"get_{name}_rank"] = partial(self._rank, axis)
            self._getters[f"get_{name}_group_ranks"] = partial(self._ranks, axis)
        for name in ("tensor_model_parallel", "slice_parallel", "model_parallel"):
            self._getters[f"get_{name}_src_rank"] = partial(self._first, axes[name])

    def __getattr__(self, name: str) -> Any:
        getters = self.__dict__.get("_getters", {})
        if name not in getters:
            raise AttributeError(f"this mpu has no {name!r}; it has {', '.join(dir(self))}")
        return getters[name]

    def __dir__(self) -> list[str]:
        return sorted({*self._getters, *(name for name in vars(type(self)) if not name.startswith("_"))})

    def __repr__(self) -> str:
        return f"ModelParallelUnit({self._bound!r})"

    # Data parallel

    def get_data_parallel_group(
        self, with_context_parallel: bool = False, partial_data_parallel: bool = False
    ) -> dist.ProcessGroup:
        """The ranks that hold the same parameters and see other samples.

        Args:
            with_context_parallel: also those that see other parts of the same samples.
            partial_data_parallel: only those that shard one copy of the optimizer (``dp_shard``).
        """
        return self._group(self._data(with_context_parallel, partial_data_parallel))

    def get_data_parallel_world_size(
        self, with_context_parallel: bool = False, partial_data_parallel: bool = False
    ) -> int:
        """How many ranks `get_data_parallel_group` has."""
        return self._size(self._data(with_context_parallel, partial_data_parallel))

    def get_data_parallel_rank(self, with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
        """This rank's place in `get_data_parallel_group`."""
        return self._rank(self._data(with_context_parallel, partial_data_parallel))

    def get_data_parallel_group_ranks(self, with_context_parallel: bool = False) -> list[int]:
        """The global ranks of `get_data_parallel_group`."""
        return self._ranks(self._data(with_context_parallel))

    def get_data_parallel_src_rank(self, with_context_parallel: bool = False) -> int:
        """The global rank of the first of them."""
        return self._first(self._data(with_context_parallel))

    def get_tensor_and_data_parallel_group(
        self, check_initialized: bool = True, with_context_parallel: bool = False
    ) -> dist.ProcessGroup:
        """The tensor and the data parallel ranks together."""
        return self._group(("tp", *self._data(with_context_parallel)))

    def get_expert_data_parallel_group(
        self, check_initialized: bool = True, partial_expert_data_parallel: bool = False
    ) -> dist.ProcessGroup:
        """The ranks that hold the same experts.

        Args:
            check_initialized: taken for Megatron's sake.
            partial_expert_data_parallel: only those inside one sharded copy.
        """
        return self._group(self._expert_data(partial_expert_data_parallel))

    def get_expert_data_parallel_world_size(self, partial_expert_data_parallel: bool = False) -> int:
        """How many ranks `get_expert_data_parallel_group` has."""
        return self._size(self._expert_data(partial_expert_data_parallel))

    def get_expert_data_parallel_rank(self, partial_expert_data_parallel: bool = False) -> int:
        """This rank's place in `get_expert_data_parallel_group`."""
        return self._rank(self._expert_data(partial_expert_data_parallel))

    # Pipeline

    def is_pipeline_first_stage(self, ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
        """Whether this rank is in the first pipeline stage; there are no virtual ones."""
        return self._rank(("pp",)) == 0

    def is_pipeline_last_stage(self, ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
        """Whether this rank is in the last pipeline stage."""
        return self._rank(("pp",)) == self._size(("pp",)) - 1

    def get_pipeline_model_parallel_first_rank(self) -> int:
        """The global rank of this rank's pipeline in the first stage."""
        return self._ranks(("pp",))[0]

    def get_pipeline_model_parallel_last_rank(self) -> int:
        """The global rank of this rank's pipeline in the last stage."""
        return self._ranks(("pp",))[-1]

    def get_pipeline_model_parallel_next_rank(self) -> int:
        """The global rank that follows in the pipeline; the first follows the last."""
        return self._ranks(("pp",))[(self._rank(("pp",)) + 1) % self._size(("pp",))]

    def get_pipeline_model_parallel_prev_rank(self) -> int:
        """The global rank before this one in the pipeline; the last comes before the first."""
        return self._ranks(("pp",))[self._rank(("pp",)) - 1]

    def get_virtual_pipeline_model_parallel_world_size(self) -> None:
        """None: stages are not interleaved here."""
        return

    def get_virtual_pipeline_model_parallel_rank(self) -> None:
        """None: stages are not interleaved here."""
        return

    def get_context_parallel_global_ranks(self, check_initialized: bool = True) -> list[int]:
        """The global ranks of the context parallel group."""
        return self._ranks(("cp",))

    def model_parallel_is_initialized(self) -> bool:
        """True: groups are made when asked for."""
        return True

    # Inside

    def _data(self, with_context_parallel: bool, partial_data_parallel: bool = False) -> Axis:
        if partial_data_parallel and "dp_shard" in self._bound.topology.names:
            return ("dp_shard", "cp") if with_context_parallel else ("dp_shard",)
        return _DATA_AND_CONTEXT if with_context_parallel else _DATA

    def _expert_data(self, inside: bool) -> Axis:
        return expert_data_axis(self._bound, inside=inside)

    def _known(self, axis: Axis) -> Axis:
        return known_axis(self._bound, axis)

    def _group(self, axis: Axis, check_initialized: bool = True) -> dist.ProcessGroup:
        return group_along(self._bound, axis)

    def _size(self, axis: Axis) -> int:
        return self._bound.size(self._known(axis)) if self._known(axis) else 1

    def _rank(self, axis: Axis) -> int:
        return self._bound.index(self._known(axis)) if self._known(axis) else 0

    def _ranks(self, axis: Axis) -> list[int]:
        return list(self._bound.ranks(self._known(axis))) if self._known(axis) else [self._bound.rank]

    def _first(self, axis: Axis) -> int:
        return self._ranks(axis)[0]

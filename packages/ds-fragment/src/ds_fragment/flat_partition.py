"""The flat fp32 partition for engines that have none: ZeRO-1's linkage over any process group and optimizer.

    partition = FlatPartition(model.parameters(), group)
    optimizer = torch.optim.AdamW([partition.hp_param], lr=1e-3)
    attach(model, optimizer)
    ...
    loss.backward()
    stats = partition.reduce_gradients()   # lp gradients -> fp32 mean, each rank its slice
    optimizer.step()                       # on this rank's slice alone
    partition.publish()                    # fp32 -> lp weights on every rank

[Note: gradient life] lp gradients pile up locally over the backward passes; `reduce_gradients` averages them over the
group into ``hp_param.grad`` and clears them; `publish`, after the optimizer's step, clears ``hp_param.grad``. In
between, and only then, there is a reduced gradient to read. It takes memory then only, so that the activations of the
backward pass have what it leaves. Nothing that outlives `reduce_gradients` holds an lp gradient either: its work is
planned by the kernels' functions, which know tensors by their addresses and find the plan again where an allocator
gives the next step the same ones.

[Note: mean] What is reduced is divided by the number of ranks and multiplied by the reciprocal of the scale, as
`torch.amp` does. A number of ranks that is a power of two divides exactly either way, and goes into that factor. For
others a product with the reciprocal is not the quotient: every third mean of 3 ranks would be off by its last bit, and
7 ranks with equal gradients would not get that gradient back. So their slice is divided first, in a pass of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment import _collectives, kernels
from ds_fragment.collective.agree import agree
from ds_fragment.engines.flat import link_of, publish
from ds_fragment.errors import GradientUnavailableError, InvalidValueError, UnlinkedParameterError, UnusedGradientError
from ds_fragment.mixed_precision_linkage import link_hp_params, unlink_hp_params
from ds_fragment.record import registry

__all__ = ["FlatPartition", "GradientStats"]


@dataclass(frozen=True, slots=True)
class GradientStats:
    """What is to be known of a reduced gradient before a step: its norm, to clip it, and whether it is finite.

    It is about the whole gradient of the group's parameters, every fragment of every rank, as `reduce_gradients` left
    it: averaged, unscaled, and with what it was added to. It is the same on every rank. It lies on the parameters'
    device: nothing waits until a number is read from it. Statistics of several partitions add up.

    Attributes:
        values: fp64, (2,): the sum of squares, and the number of elements that are infinite or NaN. Where there are
            any, the sum is not finite either. Squares are taken in fp32: that of a magnitude over 1.8e19 is infinite.
    """

    values: torch.Tensor

    @property
    def sum_squares(self) -> torch.Tensor:
        """fp64, ()."""
        return self.values[0]

    @property
    def norm(self) -> torch.Tensor:
        """The L2 norm: fp32, (), as `torch.nn.utils.clip_grads_with_norm_` takes it."""
        return self.values[0].sqrt().float()

    @property
    def nonfinite(self) -> torch.Tensor:
        """How many elements are infinite or NaN: int64, ()."""
        return self.values[1].long()


class _GradientTable(dict[int, list[torch.Tensor]]):
    """A dict that can be held weakly."""


class FlatPartition:
    """One fp32 parameter a rank, which stands for its slice of a whole group of lp parameters.

    The parameters are concatenated in the order given, cut evenly over the group (padded at the end), and each rank
    keeps its slice in fp32 as ``hp_param``, to be handed to any `torch.optim` optimizer that works element by element.
    All ranks of the group must make it, with the same parameters holding the same values.

    Args:
        params: the lp parameters: contiguous, floating-point, on one device. Frozen ones and duplicates are left out.
        group: the process group to cut over; the default group where torch.distributed is initialized, else one rank.
        index: the number of the parameter group, for several partitions side by side.

    Attributes:
        hp_param: fp32, 1-D, (partition_size,): this rank's slice, padding included.
        params: the lp parameters that it stands for.
        partition_size: elements in each rank's slice.
        group: the process group, or None.

    Raises:
        InvalidValueError: there are no parameters, or one that cannot be linked; on every rank.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None, *, index: int = 0
    ) -> None:
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise InvalidValueError(f"group is {group!r}, expected a process group that this rank is a member of")
        self.group = group
        self.world_size, self.rank = (1, 0) if group is None else (group.size(), group.rank())
        self._groups = [group] if group is not None and self.world_size > 1 else []  # with whom there is to agree
        candidates = list(dict.fromkeys(params))
        self.params = [param for param in candidates if not isinstance(param, torch.Tensor) or param.requires_grad]
        fault = _fault(self.params)
        device = self.params[0].device if fault is None else torch.device("cpu")
        shapes = [hash(tuple(param.shape)) for param in self.params] if fault is None else []
        agree(fault, self._groups, device, shapes, lambda i: f"the shape of params[{i}]")

        self._numels = [param.numel() for param in self.params]
        self.numel = sum(self._numels)
        self.partition_size = max(1, -(-self.numel // self.world_size))
        flat = torch.zeros(self.partition_size, dtype=torch.float32, device=device)
        self.hp_param = nn.Parameter(flat)
        self._gradients = _GradientTable()
        self._positions = {param: i for i, param in enumerate(self.params)}
        self._used: torch.Tensor | None = None  # fp64, (params,): over 0 where a rank used one; on the group's device
        self._used_here: list[bool] | None = None  # the same, once somebody has looked
        self._consumed = False
        link_hp_params(
            self.params,
            self.hp_param,
            weakref.proxy(self._gradients),
            None,
            False,
            index,
            self.rank * self.partition_size,
            self.partition_size,
            group,
        )
        self._index = index
        self._fragments = [p._hp_mapping for p in self.params if p._hp_mapping is not None]  # type: ignore[attr-defined]
        slices = tuple((rank * self.partition_size, self.partition_size) for rank in range(self.world_size))
        self._spans: list[tuple[int, int]] = []  # in the partition, by _index_in_param_group; empty ones too
        for param in self.params:
            link = link_of(param)
            assert link is not None
            link.owner = weakref.ref(self)
            link.slices.known = slices
            if hasattr(param, "_index_in_param_group"):
                address = param._hp_mapping and param._hp_mapping.get_hp_fragment_address()  # type: ignore[attr-defined]
                self._spans.append((address.start, address.numel) if address else (0, 0))
        with torch.no_grad():
            kernels.copy(
                [fragment.hp_fragment for fragment in self._fragments],
                [fragment.lp_fragment for fragment in self._fragments],
            )

    def reduce_gradients(self, *, scale: float = 1.0, accumulate: bool = False) -> GradientStats:
        """Average the lp gradients over the group into ``hp_param.grad``, in fp32, and clear them.

        All ranks of the group must call it, after the last backward pass of a step. A parameter that no rank used has
        no gradient afterwards; one that only some ranks used counts as zero on the others. On one rank the host does
        not wait for the device; several ranks wait for each other, and for the backward pass, to agree on the call.

        Args:
            scale: what the loss was multiplied by; gradients are multiplied by its reciprocal.
            accumulate: add to the gradient that is there instead of replacing it.

        Returns:
            The norm and the number of non-finite elements of the whole gradient, the same on every rank.

        Raises:
            InvalidValueError: ``scale`` is not a positive number that fp32 holds, with its reciprocal, or a gradient
                is sparse; on every rank, and nothing changes.
            UnlinkedParameterError: the parameters were unlinked, or linked to another partition.
        """
        device = self.hp_param.device
        error = self._unlinked() or self._bad_gradients(scale)
        sums = [] if error is not None else [hash(float(scale)), int(accumulate)]
        agree(error, self._groups, device, sums, lambda i: ("scale", "accumulate")[i])

        grads = {i: param.grad for i, param in enumerate(self.params) if param.grad is not None}
        gradient = self.hp_param.grad if accumulate else None
        adds = gradient is not None
        if not adds:  # its memory is there for the new one
            self.hp_param.grad = None
            self._gradients.clear()
        if self.world_size == 1:
            sources, numels = grads, self._numels
        else:
            total = self._sum_over_ranks(grads)
            sources, numels = {0: total}, [total.numel()]
            if self.world_size & (self.world_size - 1):  # see [Note: mean]
                total.div_(self.world_size)
            else:
                scale *= self.world_size
        if gradient is None:
            gradient = torch.empty(self.partition_size, dtype=torch.float32, device=device)
        *pieces, padding = gradient.split_with_sizes([*numels, self.partition_size - sum(numels)])
        targets = [pieces[i] for i in sources]
        stats = kernels.gather_grads(targets, list(sources.values()), scale=1 / scale, accumulate=adds)
        found = stats.values[::2].to(device)  # the sum of squares, and how many are not finite
        rest = [piece for i, piece in enumerate(pieces) if i not in sources]
        if not adds:
            _zero([*rest, padding])
        elif rest:  # what was there before counts too
            found = found + kernels.norm(rest).values[::2]

        used = torch.tensor([float(i in grads) for i in range(len(self.params))], dtype=torch.float64)
        if self.world_size > 1:
            used, found = self._tell(used, found)
        if adds and self._used is not None:
            used = used + self._used
        self._used, self._used_here, self._consumed = used, None, False
        self.hp_param.grad = gradient
        self._gradients[self._index] = [gradient.narrow(0, start, numel) for start, numel in self._spans]
        for param in self.params:
            param.grad = None
        return GradientStats(found)

    def _sum_over_ranks(self, grads: dict[int, torch.Tensor]) -> torch.Tensor:
        """This rank's slice of the sum of the ranks' lp gradients, given by position: fp32, 1-D, without padding."""
        assert self.group is not None
        device, on = self.hp_param.device, _collectives.device_for(self.group, self.hp_param.device)
        mine = torch.empty(self.world_size * self.partition_size, dtype=torch.float32, device=device)
        pieces = mine[: self.numel].split_with_sizes(self._numels)  # the padding is left as it is: nobody reads it
        kernels.copy([pieces[i] for i in grads], list(grads.values()))
        _zero(piece for i, piece in enumerate(pieces) if i not in grads)
        total = torch.empty(self.partition_size, dtype=torch.float32, device=on)
        _collectives.leave_gently(on.type)
        _collectives.reduce_scatter(total, mine.to(on), group=self.group)
        held = min(max(self.numel - self.rank * self.partition_size, 0), self.partition_size)
        return total.to(device)[:held]

    def _tell(self, used: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the ranks, in one small collective: who used which parameter, and the statistics of the slices."""
        assert self.group is not None
        on = _collectives.device_for(self.group, self.hp_param.device)
        if on.type == "cuda":
            used = used.pin_memory()  # else the host would wait for the copy, and so for all that came before it
        told = torch.cat([used.to(on, non_blocking=True), found.to(on)])
        dist.all_reduce(told, group=self.group)
        return told[: len(used)], told[len(used) :].to(self.hp_param.device)

    def publish(self) -> None:
        """Write the fp32 slices into the whole lp parameters of every rank, and clear the consumed gradient.

        All ranks of the group must call it, after the optimizer's step.

        Raises:
            UnlinkedParameterError: the parameters were unlinked, or linked to another partition; on every rank.
        """
        agree(self._unlinked(), self._groups, self.hp_param.device)
        publish(self.params)
        self.hp_param.grad = None
        self._gradients.clear()
        self._consumed = self._consumed or self._used is not None
        self._used = self._used_here = None

    def unlink(self) -> None:
        """Take the linkage off the lp parameters, but for those linked anew since; afterwards they are plain ones."""
        unlink_hp_params([param for param in self.params if self._owns(param)])

    def _owns(self, param: torch.Tensor) -> bool:
        link = link_of(param)
        return link is not None and link.flat() is self.hp_param

    def _unlinked(self) -> UnlinkedParameterError | None:
        i = next((i for i, param in enumerate(self.params) if not self._owns(param)), None)
        if i is None:
            return None
        return UnlinkedParameterError(
            f"params[{i}], {registry.name_of(self.params[i])}, is not linked to this partition any more: it was "
            "unlinked, or a later FlatPartition took it over"
        )

    def _bad_gradients(self, scale: float) -> InvalidValueError | None:
        if not (isinstance(scale, int | float) and 2.0**-126 <= scale <= 2.0**126):
            return InvalidValueError(
                f"scale is {scale!r}, expected what the loss was multiplied by: a positive number, normal in fp32 "
                "as its reciprocal is"
            )
        for i, param in enumerate(self.params):
            if param.grad is not None and param.grad.layout != torch.strided:
                return InvalidValueError(
                    f"params[{i}], {registry.name_of(param)}, has a gradient of layout {param.grad.layout}, expected a "
                    "dense one: make the embedding with sparse=False"
                )
        return None

    def no_gradient(self, param: torch.Tensor) -> GradientUnavailableError | None:
        """The error where there is no reduced gradient of the parameter now, None where there is one."""
        kind = GradientUnavailableError
        if param.grad is not None:
            reason = "it is not reduced yet: call reduce_gradients() on every rank after the last backward pass"
        elif self._used is None or self.hp_param.grad is None:
            consumed = self._consumed or self._used is not None
            reason = (
                "it was consumed by the last step: read it between reduce_gradients() and publish()"
                if consumed
                else "no backward pass was reduced yet"
            )
        else:
            if self._used_here is None:  # waits for the device
                self._used_here = [count > 0 for count in self._used.tolist()]
            if self._used_here[self._positions[param]]:
                return None
            kind, reason = UnusedGradientError, "no rank used the parameter in this backward pass"
        return kind(f"{registry.name_of(param)} has no gradient to read: {reason}")

    def __repr__(self) -> str:
        return (
            f"FlatPartition({len(self.params)} parameters, {self.numel} elements, rank {self.rank} of "
            f"{self.world_size} holds {self.partition_size})"
        )


def _zero(tensors: Iterable[torch.Tensor]) -> None:
    some = [tensor for tensor in tensors if tensor.numel()]
    if some:
        torch._foreach_zero_(some)


def _fault(params: list[torch.Tensor]) -> InvalidValueError | None:
    """What is wrong with the parameters, or None."""
    if not params:
        return InvalidValueError("params is empty, or all of it is frozen: pass the parameters that require a gradient")
    for i, param in enumerate(params):
        if not isinstance(param, torch.Tensor) or hasattr(param, "full_tensor"):
            return InvalidValueError(
                f"params[{i}] is a {type(param).__name__}, expected a parameter that is not sharded"
            )
        if not param.dtype.is_floating_point:
            return InvalidValueError(f"params[{i}] has dtype {param.dtype}, expected a floating-point one")
        if not param.is_contiguous():
            return InvalidValueError(f"params[{i}] of shape {tuple(param.shape)} is not contiguous: make it so first")
        if param.device != params[0].device:
            return InvalidValueError(
                f"params[{i}] is on {param.device} and params[0] on {params[0].device}: make one FlatPartition a device"
            )
    return None

"""The weights of a sharded run as an inference engine wants them: by name, whole, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment._collectives import CollectiveError
from ds_fragment.api.lora import Weight, merged_weights, plain_weights
from ds_fragment.api.pacing import Pace
from ds_fragment.api.read import iter_full
from ds_fragment.api.single import get_local
from ds_fragment.collective.agree import agree
from ds_fragment.collective.digest import digests
from ds_fragment.engines import Adapter, held_by
from ds_fragment.engines.counts import over_ranks
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, InvalidValueError, RankMismatchError
from ds_fragment.layout import batches
from ds_fragment.sharding import Sharding

Rename = Callable[[str], str | None]
_CHUNK_BYTES, _CHUNK_BYTES_GPU = 64 << 20, 256 << 20
_BEGUN = ("", torch.empty(0))

# Of each weight: what its bits are on this rank, to be compared with an earlier one.
_Digests = dict[str, tuple[object, ...]]


@dataclass(frozen=True)
class WeightInfo:
    """What a receiver has to know of a weight before it arrives.

    Attributes:
        name: in the user's own model, or as ``rename`` has it.
        dtype: of the tensor that is yielded.
        shape: of the whole.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def dtype_name(self) -> str:
        """The dtype in a word, such as ``bfloat16``, as the requests to inference servers have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.shape.numel() * self.dtype.itemsize


class WeightSource:
    """The whole weights of a sharded model as (name, tensor) pairs, to be sent to an inference engine again and again.

    `metadata` says what comes; each iteration yields it. vLLM's trainer side takes such an object, or its iterator,
    for its NCCL and CUDA IPC transfers; SGLang's ``update_weights_from_distributed`` takes the names, dtypes and shapes
    first, and then one broadcast for each tensor. Names are those of the user's own model, without what DDP, FSDP,
    activation checkpointing, ``torch.compile`` and DeepSpeed put into them. Tied weights come once, as in
    ``named_parameters()``. Buffers are not among them.

    All ranks of ``group`` must iterate, to the end, each time: ``for _ in source: pass`` on those that receive nothing.
    The receiver sets the pace. It may take any time between two weights: the other ranks wait on the host meanwhile,
    with no collective under way that would time out, and come out of the iteration when the receiver does. A receiver
    that does not take all weights ends the iteration on all ranks as soon as its iterator is closed or deleted; an
    error that is kept may keep it alive, so write ``with contextlib.closing(iter(source)) as weights``. If the receiver
    dies the others raise when the store of the default process group dies with it, or are ended by their launcher.

    Args:
        model: the sharded model, wrapped or not; attached where its engine needs that (see `attach`).
        dtype: what floating-point weights are cast to, before they travel if it has fewer bytes; unless told, that of
            the quantity.
        what: ``"lp"``, the weights that the model computes with, or ``"value"``, the fp32 ones.
        dst: the global rank that receives. None: every rank does, at its own pace, without the store.
        merge_lora: yield the weights of the model that was given to peft, under its names, with the active LoRA
            adapters merged (``W + scaling * B @ A`` in fp32, cast once; rslora is in the scaling) and the modules of
            ``modules_to_save`` in place. Nothing in the model changes. Unless set, a model with LoRA layers is yielded
            as it is: the base weights and the adapters, each under the name that peft gives it.
        changed_only: from the second iteration on, yield only weights of which a bit has changed since the last
            iteration that came to its end. Each rank keeps one number for each of its pieces.
        bucket_bytes: how much is gathered before the receiver takes it; unless told, 64 MiB on a CPU, 256 MiB on a GPU,
            or the largest weight where that is more.
        rename: makes a receiver's name of each name, or None for what is left out, such as
            ``lambda name: name if ".lora_" in name else None`` for the adapters alone. It must be the same on every
            rank.
        group: the trainer's ranks; the default group unless told.

    Raises:
        InvalidValueError: ``what`` is neither word.
        ValueError: ``dst`` is not in the group, or ``bucket_bytes`` not positive.

    >>> source = WeightSource(nn.Linear(2, 1))
    >>> [(info.name, info.dtype_name, tuple(info.shape)) for info in source.metadata()]
    [('weight', 'float32', (1, 2)), ('bias', 'float32', (1,))]
    >>> [name for name, tensor in source]
    ['weight', 'bias']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        what: Literal["lp", "value"] = "lp",
        dst: int | None = 0,
        merge_lora: bool = False,
        changed_only: bool = False,
        bucket_bytes: int | None = None,
        rename: Rename | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if what not in ("lp", "value"):
            raise InvalidValueError(f"what is {what!r}, expected 'lp' (what the model computes with) or 'value' (fp32)")
        if bucket_bytes is not None and bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes is {bucket_bytes}, expected a positive number of bytes")
        self._group = dist.group.WORLD if group is None and dist.is_initialized() else group
        ranks = [0] if self._group is None else dist.get_process_group_ranks(self._group)
        if dst is not None and dst not in ranks:
            raise ValueError(f"dst is {dst}, expected a global rank of the group, {ranks}, or None for all of them")
        self._model, self._dtype, self._what, self._merge = model, dtype, what, merge_lora
        self._dst = dst if len(ranks) > 1 else None
        self._changed_only, self._bucket_bytes, self._rename = changed_only, bucket_bytes, rename
        self._sent: _Digests = {}  # of the iterations that came to their end
        self._next: tuple[list[str], _Digests] | None = None  # what the next iteration yields, if that is agreed

    def __len__(self) -> int:
        """How many weights there are, changed or not."""
        return len(self._weights())

    def metadata(self) -> list[WeightInfo]:
        """Name, dtype and shape of every weight, in the order of iteration, the same on every rank. No communication.

        With ``changed_only``, `changed` says which of them the next iteration yields.

        Raises:
            InvalidValueError: with ``merge_lora``, a layer cannot be merged exactly (DoRA and other variants,
                embeddings, convolutions, quantised layers, ``lora_bias=True``, tied weights); or ``rename`` gives one
                name to two weights.
            FragmentError: with ``what="value"``, where `link_hp_params` linked the weights and none was read yet.
        """
        return [self._info(weight) for weight in self._weights()]

    def changed(self) -> list[WeightInfo]:
        """What the next iteration yields with ``changed_only``: `metadata` of the weights that have changed.

        All ranks of the group must call it; one small collective. The next iteration yields these, and what changes
        after this call is found to have changed by the next one.

        Raises:
            InvalidValueError: the source was made without ``changed_only``.
            FragmentError: a rank cannot read its piece of a weight; the same on every rank.
            RankMismatchError: the ranks have different weights.
        """
        if not self._changed_only:
            raise InvalidValueError("changed_only is False, expected True to ask what has changed: use metadata()")
        weights = self._alike()
        self._next = self._agree(weights)
        chosen = set(self._next[0])
        return [self._info(weight) for weight in weights if weight.name in chosen]

    def __iter__(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield (name, whole tensor) on the receiver, and nothing on the other ranks, which all must iterate as well.

        Yields:
            Fresh tensors. On a GPU they are there for what is set off on the current stream, and small ones share
            storages: clone one that is to be kept.

        Raises:
            FragmentError: a rank could not deliver its piece; the same on every rank. Or the receiver ended early, or
                the store of the default process group is gone; on the other ranks.
            RankMismatchError: the ranks have different weights.
        """
        steps = self._steps()
        next(steps)  # to its first yield: from here on it notices that it is closed
        return steps

    def _steps(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        pace = None if self._dst is None or self._group is None else Pace(self._group, self._dst)
        try:
            yield _BEGUN
            if pace is not None:
                pace.step()
            weights, digests = self._alike(), _Digests()
            if self._changed_only:
                names, digests = self._next or self._agree(weights)
                self._next, chosen = None, set(names)
                weights = [weight for weight in weights if weight.name in chosen]
            for chunk in self._chunks(weights):
                if pace is not None:
                    pace.step()
                yield from self._gathered(chunk)
            if pace is not None:
                pace.step()  # the other ranks go on only now: their next collective may be one with the receiver
        except BaseException as error:
            if pace is not None:
                closed = isinstance(error, GeneratorExit)
                pace.abandon("its iterator was closed" if closed else f"{type(error).__name__}: {error}")
            raise
        if pace is not None:
            pace.leave()
        self._sent.update(digests)

    def _gathered(self, chunk: Sequence[Weight]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of a chunk; all of it is here before the first is yielded, so that no collective is under way."""
        params = [param for weight in chunk for param in weight.params]
        limit = self._limit(chunk)
        dtype = None if any(weight.deltas for weight in chunk) else self._dtype  # what is merged is cast afterwards
        found = iter_full(params, self._what, bucket_bytes=limit, dst=self._dst, dtype=dtype)
        wholes = [whole for _, whole in found][::-1]
        for weight in chunk if wholes else ():
            yield weight.name, weight.merged([wholes.pop() for _ in weight.params], self._dtype)

    def _weights(self) -> list[Weight]:
        """What the model has now, by the names that the receiver knows."""
        with known_engine():
            found = merged_weights(self._model) if self._merge else plain_weights(self._model)
        if self._rename is None:
            return found
        renamed: dict[str, Weight] = {}
        for weight in found:
            name = self._rename(weight.name)
            if name in renamed:
                raise InvalidValueError(f"rename gives the name '{name}' to two weights, expected one for each")
            if name is not None:
                renamed[name] = Weight(name, weight.param, weight.deltas)
        return list(renamed.values())

    def _alike(self) -> list[Weight]:
        """`_ready`, once all ranks know that they have the same weights; one small collective."""
        if self._group is None:
            return self._ready()
        error: Exception | None = None
        weights, total = list[Weight](), 0
        try:
            weights = self._ready()
            words = repr([(info.name, info.dtype, *info.shape) for info in map(self._info, weights)])
            total = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "little")
        except Exception as caught:
            error = caught
        with _named_if_broken():  # on the CPU where the group can, as a rank in error knows of no other device
            agree(error, [self._group], torch.device("cpu"), [total], differ=_different_weights)
        return weights

    def _ready(self) -> list[Weight]:
        """`_weights`, once the ranks have told each other what their engines need to place them; all ranks call it."""
        weights, params = self._weights(), dict[Adapter, list[torch.Tensor]]()
        with known_engine():
            for weight in weights:
                for adapter, param in map(held_by, weight.params):
                    params.setdefault(adapter, []).append(param)
            for adapter, chosen in params.items():
                adapter.prepare(chosen)
        return weights

    def _sharding(self, param: torch.Tensor) -> Sharding:
        with known_engine():
            adapter, param = held_by(param)
            return adapter.sharding(param, self._what)

    def _cast(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _info(self, weight: Weight) -> WeightInfo:
        sharding = self._sharding(weight.param)
        return WeightInfo(weight.name, self._cast(sharding.dtype), sharding.shape)

    def _limit(self, weights: Sequence[Weight]) -> int:
        if self._bucket_bytes is not None:
            return self._bucket_bytes
        on_cpu = all(self._sharding(weight.param).device.type == "cpu" for weight in weights)
        return _CHUNK_BYTES if on_cpu else _CHUNK_BYTES_GPU

    def _chunks(self, weights: Sequence[Weight]) -> list[list[Weight]]:
        """As many weights at a time as fit; the same on every rank."""
        taken = [sum(self._sharding(param).nbytes for param in weight.params) for weight in weights]
        return [[weights[at] for at in chunk] for chunk in batches(taken, self._limit(weights))]

    def _agree(self, weights: Sequence[Weight]) -> tuple[list[str], _Digests]:
        """The names of what has changed on any rank, and what all is now on this one; all ranks call it."""
        now: _Digests = {}

        def differ(items: list[int]) -> torch.Tensor:
            for weight in (weights[item] for item in items):
                shards = [get_local(param, self._what) for param in weight.params]
                now[weight.name] = (
                    *digests(shards, [shard.dtype for shard in shards], shards[0].device),
                    *((delta.scaling, delta.transposed) for delta in weight.deltas),
                )
            names = [weights[item].name for item in items]
            flags = [now[name] != self._sent.get(name) for name in names]
            return torch.tensor(flags, dtype=torch.float64)

        device = self._sharding(weights[0].param).device if weights else torch.device("cpu")
        with _named_if_broken():
            flags = over_ranks([self._group] * len(weights), device, differ, lambda rows: rows.amax(dim=0))
        return [weight.name for weight, flag in zip(weights, flags, strict=True) if flag], now


def _different_weights(_: str) -> FragmentError:
    return RankMismatchError(
        "the ranks have weights of different names, shapes or dtypes: pass a model, dtype, what and rename that are "
        "alike on every rank of the group; ranks with other layers or experts need a source with a group of their own"
    )


@contextlib.contextmanager
def _named_if_broken() -> Iterator[None]:
    """Say what a collective was about that did not come to its end."""
    try:
        yield
    except CollectiveError as error:
        raise FragmentError(f"the comparison of the ranks' weights {error}") from error

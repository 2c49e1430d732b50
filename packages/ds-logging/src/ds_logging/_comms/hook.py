"""Notes every operation that Python code gives to a process group, however it imported the function that does so.

``torch.distributed``'s functions, FSDP2, DeepSpeed and pipelines end in a method of ``ProcessGroup``, so these methods
are replaced while a communication log records, and put back afterwards. What C++ issues by itself (DDP's reducer,
functional collectives, compiled code) does not pass here; ``flight_recorder`` sees it. Here is what that one lacks:
point-to-point operations and barriers of gloo, the host's time of operations without a device, and the issuing thread.

[Note: composite] Functions for objects and ``batch_isend_irecv`` are made of several operations. Each part is one
operation of the group, and counts as such; the call counts besides, under its own name, with the bytes of its parts.

[Note: host time] ``Work.wait`` of an operation on the CPU returns when it is over. So the end is known exactly where
the caller had to wait. Where the operation was over before, its end was not seen, and no time is made up: it counts,
without a latency. On CUDA ``wait`` orders streams only; there the flight recorder has the device's own time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections import deque
from collections.abc import Callable
from threading import get_ident
from time import time_ns
from typing import Any

# method of ProcessGroup: (canonical name of the operation, which argument holds this rank's share)
METHODS: dict[str, tuple[str, int | None]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
}

COMPOSITES = (
    "all_gather_object",
    "batch_isend_irecv",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
)


class Span:
    """A stretch of one thread, whose operations may have a name, or are left out.

    Attributes:
        name: of its operations, see `CommsLogger.timed`; ``None`` for their own.
        hidden: its operations are left out.
        count, nbytes: of the operations that were issued in it.
        outer: the span that it stands in.
    """

    __slots__ = ("count", "hidden", "name", "nbytes", "outer")

    def __init__(self, name: str | None, hidden: bool, outer: Span | None) -> None:
        self.name: str | None = name if name is not None or outer is None else outer.name
        self.hidden: bool = hidden or (outer is not None and outer.hidden)
        self.outer = outer
        self.count = 0
        self.nbytes = 0


class Issued:
    """An operation that Python gave to a process group.

    Attributes:
        group: the ``ProcessGroup``.
        kind: the operation's canonical name.
        nbytes, dtype: of this rank's share; -1 and "" where the arguments do not tell.
        on_host: whether its end can be seen from the host, see [Note: host time].
        peer: group rank of the other side of a point-to-point operation.
        began_ns, returned_ns: ``time.time_ns()`` around the call; ``returned_ns`` is 0 until it returned.
        thread: identifier of the calling thread.
        latency_ms: from the call to its observed end.
        waited: somebody waits or has waited for it.
        over: it has ended.
        failed: the call, or waiting for it, raised.
        name: the name that `CommsLogger.append` gave to it.
        span: the span that it was issued in.
    """

    __slots__ = (
        "began_ns",
        "dtype",
        "failed",
        "group",
        "kind",
        "latency_ms",
        "name",
        "nbytes",
        "on_host",
        "over",
        "peer",
        "returned_ns",
        "span",
        "thread",
        "waited",
    )

    def __init__(self, group: Any, kind: str, nbytes: int, dtype: Any, on_host: bool, peer: int | None) -> None:
        self.group = group
        self.kind = kind
        self.nbytes = nbytes
        self.dtype = dtype
        self.on_host = on_host
        self.peer = peer
        self.thread = get_ident()
        self.latency_ms: float | None = None
        self.waited = False
        self.over = False
        self.failed = False
        self.name: str | None = None
        self.span: Span | None = None
        self.returned_ns = 0
        self.began_ns = time_ns()


class Hook:
    """Replaces the methods of ``ProcessGroup`` and ``Work.wait``, and puts them back.

    Args:
        c10d: the module ``torch._C._distributed_c10d``.
    """

    def __init__(self, c10d: Any) -> None:
        self._group_class = c10d.ProcessGroup
        self._work_class = c10d.Work
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, what it was, what it is
        self.issued: deque[Issued] = deque()
        """What was issued, oldest first. An operation is appended before its method is called."""
        self.spans: dict[int, Span] = {}
        """The innermost open span of each thread, by its identifier."""
        self.on_time_out: Callable[[], None] | None = None
        """Called when a wait has timed out, before the error goes on."""
        self._capturing: set[int] = set()
        """Threads that capture a CUDA graph: what they issue does not happen now, and its replays do not pass here."""
        # By id of the Work that somebody may wait for. The reference tells it from a later one at the same address.
        self._unfinished: dict[int, tuple[weakref.ref[Any], Issued]] = {}

    def install(self) -> None:
        """Replace the methods that this torch has."""
        for name, (kind, argument) in METHODS.items():
            original = self._group_class.__dict__.get(name)
            if original is not None:
                self._replace(self._group_class, name, original, self._noting(name, kind, argument))
        self._replace(self._work_class, "wait", self._work_class.__dict__["wait"], self._waiting())
        for name in COMPOSITES:
            self._wrap_composite(name)
        graph_class: Any = getattr(getattr(sys.modules["torch"], "cuda", None), "CUDAGraph", None)
        for name, note in (("capture_begin", self._capturing.add), ("capture_end", self._capturing.discard)):
            original = getattr(graph_class, "__dict__", {}).get(name)
            if original is not None:
                self._replace(graph_class, name, original, _noting_capture(original, note))

    def remove(self) -> None:
        """Put back what was replaced, unless somebody has replaced it again since; then ours only passes calls on."""
        self._capturing.clear()
        for owner, name, original, ours in self._replaced:
            if getattr(owner, name, None) is ours:
                setattr(owner, name, original)
        self._replaced.clear()
        self._unfinished.clear()

    def forget_dropped(self) -> None:
        """Forget what nobody can wait for any more."""
        for number, (reference, _) in list(self._unfinished.items()):
            if reference() is None:
                self._unfinished.pop(number, None)

    def _replace(self, owner: Any, name: str, original: Any, ours: Callable[..., Any]) -> None:
        setattr(owner, name, ours)
        self._replaced.append((owner, name, original, ours))

    def _noting(self, name: str, kind: str, argument: int | None) -> Callable[..., Any]:
        # The class's own attribute is a descriptor; what getattr returns takes the group as its first argument.
        original = getattr(self._group_class, name)
        capturing = self._capturing
        installed, note, unfinished, spans = self._replaced, self.issued.append, self._unfinished, self.spans
        has_peer = name in ("send", "recv")

        @functools.wraps(original)
        def noted(group: Any, *args: Any, **kwargs: Any) -> Any:
            if not installed:
                return original(group, *args, **kwargs)
            nbytes, dtype, on_host = 0, "", True
            if argument is not None:
                nbytes, dtype, on_host = _described(args, argument)
                if capturing and not on_host and get_ident() in capturing:
                    return original(group, *args, **kwargs)
            operation = Issued(group, kind, nbytes, dtype, on_host, args[1] if has_peer and len(args) > 1 else None)
            if spans:
                _note_in_span(operation, spans.get(operation.thread))
            note(operation)
            try:
                work = original(group, *args, **kwargs)
            except BaseException:
                operation.over = operation.failed = True
                raise
            finally:
                operation.returned_ns = time_ns()
            if not on_host:
                return work
            if work is None:  # monitored_barrier waits by itself
                operation.latency_ms = (operation.returned_ns - operation.began_ns) / 1e6
                operation.over = True
            else:
                unfinished[id(work)] = (weakref.ref(work), operation)
            return work

        return noted

    def open_span(self, name: str | None, *, hidden: bool = False) -> Span:
        """Begin a span of the calling thread."""
        thread = get_ident()
        span = self.spans[thread] = Span(name, hidden, self.spans.get(thread))
        return span

    def close_span(self, span: Span) -> None:
        """End the span that this thread began last."""
        if span.outer is None:
            self.spans.pop(get_ident(), None)
        else:
            self.spans[get_ident()] = span.outer

    def _wrap_composite(self, name: str) -> None:
        module: Any = sys.modules["torch.distributed.distributed_c10d"]
        function = getattr(module, name, None)
        inner = getattr(function, "__wrapped__", None)
        closure: tuple[Any, ...] = getattr(function, "__closure__", None) or ()
        cell = next((cell for cell in closure if cell.cell_contents is inner), None)
        if inner is not None and cell is not None:  # torch's own wrapper calls what is in the cell, whoever imported it
            self._replace(cell, "cell_contents", inner, self._noting_composite(inner, name))
        elif function is not None:
            ours = self._noting_composite(function, name)
            for owner in (module, sys.modules["torch.distributed"]):
                if getattr(owner, name, None) is function:
                    self._replace(owner, name, function, ours)

    def _noting_composite(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        installed, signature = self._replaced, inspect.signature(original)

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            group = _group_of(signature, args, kwargs) if installed else None
            if group is None:
                return original(*args, **kwargs)
            operation = Issued(group, name, 0, "", True, None)
            _note_in_span(operation, self.spans.get(operation.thread))
            self.issued.append(operation)
            span = self.open_span(None)
            try:
                result = original(*args, **kwargs)
                if name != "batch_isend_irecv":  # that one returns before its parts are over
                    operation.latency_ms = (time_ns() - operation.began_ns) / 1e6
                return result
            except BaseException:
                operation.failed = True
                raise
            finally:
                self.close_span(span)
                operation.nbytes = span.nbytes
                operation.returned_ns = time_ns()
                operation.over = True

        return noted

    def _waiting(self) -> Callable[..., Any]:
        original, is_completed = self._work_class.wait, self._work_class.is_completed
        unfinished = self._unfinished

        @functools.wraps(original)
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            reference, operation = unfinished.pop(id(work), _NOTHING)
            held: Any = reference()
            if operation is None or held is not work:
                return original(work, *args, **kwargs)
            operation.waited = True
            seen = not is_completed(work)
            try:
                finished = original(work, *args, **kwargs)
                if operation.kind == "recv" and operation.peer is None:  # from any source: now it is known
                    with contextlib.suppress(RuntimeError):
                        operation.peer = work._source_rank()
                if seen:
                    operation.latency_ms = (time_ns() - operation.began_ns) / 1e6
                return finished
            except BaseException as error:
                if self.on_time_out is not None and _is_time_out(error):
                    self.on_time_out()  # the operation counts as in flight until then
                operation.failed = True
                raise
            finally:
                operation.over = True

        return wait


def _no_work() -> None:
    return None


_NOTHING: tuple[Callable[[], Any], None] = (_no_work, None)


def _noting_capture(original: Callable[..., Any], note: Callable[[int], None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note(get_ident())
        return original(*args, **kwargs)

    return noted


def _is_time_out(error: BaseException) -> bool:
    text = str(error).lower()  # torch has no error class for it
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def _note_in_span(operation: Issued, span: Span | None) -> None:
    operation.span = span
    while span is not None:
        span.count += 1
        span.nbytes += max(operation.nbytes, 0)
        span = span.outer


def _group_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the process group that a call of a composite function is for; ``None`` where the call will raise."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    if "p2p_op_list" in given:
        group = next((getattr(operation, "group", None) for operation in given["p2p_op_list"]), None)
    else:
        group = given.get("group")
    world = sys.modules["torch.distributed"].group.WORLD
    group = world if group is None else group
    return group if hasattr(group, "group_name") else None


def _described(args: tuple[Any, ...], argument: int) -> tuple[int, Any, bool]:
    """Return bytes, dtype and whether they are on the CPU, of one argument: a tensor or nested lists of tensors."""
    if argument >= len(args):  # given by keyword
        return -1, "", True
    given = args[argument]
    if type(given) is list and len(given) == 1:
        given = given[0]
    try:
        return given.nbytes, given.dtype, given.is_cpu
    except AttributeError:
        tensors = list(_tensors(given))
        if not tensors:
            return -1, "", True
        return sum(tensor.nbytes for tensor in tensors), tensors[0].dtype, tensors[0].is_cpu


def _tensors(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _tensors(one)
    elif hasattr(given, "nbytes"):
        yield given

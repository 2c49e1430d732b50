"""What is in a checkpoint of safetensors files, and what differs between two; a part of a tensor is read at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ds_fragment.checkpoint.files import Reader
from ds_fragment.errors import CheckpointError

StrPath = str | os.PathLike[str]
Kind = Literal["only in A", "only in B", "shape", "dtype", "values"]

_CHUNK = 1 << 20  # elements that are compared or summed at once, unless one row has more
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: of the tensor.
        dtype: in a word, such as ``bfloat16``.
        shape: of the tensor.
        nbytes: in the file.
        file: the name of the file that has it.
        norm: the 2-norm, summed in float64; None unless asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    norm: float | None = None


@dataclass(frozen=True)
class StoredState:
    """The optimizer state of a checkpoint.

    Attributes:
        file: what the weights' metadata calls it.
        states: by key, such as ``exp_avg``, for how many parameters it is there.
        nbytes: of all states.
        param_groups: the hyperparameters of each, with the number of parameters as ``params``.
        error: why it cannot be read; None if it can.
    """

    file: str
    states: dict[str, int]
    nbytes: int
    param_groups: list[dict[str, Any]]
    error: str | None = None


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        path: the file, or the index.
        tensors: in the order of the names.
        metadata: strings of the header and the index.
        tied: by alias, the name under which a tensor is stored.
        optimizer: of the optimizer state beside the weights, if there is some.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    tied: dict[str, str]
    optimizer: StoredState | None

    def _files(self) -> set[str]:
        return {each.file for each in self.tensors}

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """By dtype, and under ``all``: tensors, elements and bytes."""
        found: dict[str, tuple[int, int, int]] = {}
        for tensor in self.tensors:
            for key in (tensor.dtype, "all"):
                count, elements, nbytes = found.get(key, (0, 0, 0))
                found[key] = (count + 1, elements + math.prod(tensor.shape), nbytes + tensor.nbytes)
        everything = found.pop("all", (0, 0, 0))
        return {**dict(sorted(found.items())), "all": everything}

    def table(self) -> list[list[str]]:
        """A row of titles, and one for each tensor; norms where there are any, files where there are several."""
        rows = [["name", "dtype", "shape", "bytes"]]
        rows += [[each.name, each.dtype, str(each.shape), str(each.nbytes)] for each in self.tensors]
        more: dict[str, list[str]] = {}
        if any(each.norm is not None for each in self.tensors):
            more["norm"] = [f"{each.norm:.9g}" for each in self.tensors]
        if len(self._files()) > 1:
            more["file"] = [each.file for each in self.tensors]
        for title, cells in more.items():
            rows = [[*row, cell] for row, cell in zip(rows, [title, *cells], strict=True)]
        return rows

    def summary(self) -> list[str]:
        """Lines about the checkpoint as a whole."""
        lines = [f"{self.path}: {_count(len(self.tensors), 'tensor')} in {_count(len(self._files()), 'file')}"]
        for dtype, (count, elements, nbytes) in self.totals().items():
            lines.append(f"{dtype}: {_count(count, 'tensor')}, {_count(elements, 'element')}, {nbytes} bytes")
        lines += [f"tied: {alias} is {name}" for alias, name in self.tied.items()]
        lines += [f"metadata: {key} = {text}" for key, text in self.metadata.items() if key != "tied"]
        if self.optimizer is not None:
            lines += _optimizer_lines(self.optimizer)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it; a norm that is no finite number is its name, such as ``"nan"``."""
        found = asdict(self)
        totals = {
            dtype: {"tensors": count, "elements": elements, "bytes": nbytes}
            for dtype, (count, elements, nbytes) in self.totals().items()
        }
        made: dict[str, Any] = _as_json({**found, "path": str(self.path), "totals": totals})
        return made

    def __str__(self) -> str:
        return "\n".join([*_aligned(self.table()), "", *self.summary()])


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between checkpoints A and B.

    Attributes:
        name: of the tensor.
        kind: the first of these that applies.
        a: what A has, such as ``float32 (3, 4)``; empty where it has nothing.
        b: likewise of B.
        elements: how many differ: in their bits, or in their values where the dtypes differ; 0 where the shapes do.
        largest: the largest absolute difference; infinite where only one is NaN. None where no values were compared.
        where: the index of that element; None where no elements differ.
        values: what A and B have there.
    """

    name: str
    kind: Kind
    a: str
    b: str
    elements: int = 0
    largest: float | None = None
    where: tuple[int, ...] | None = None
    values: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.kind in ("only in A", "only in B"):
            return f"{self.kind}: {self.name} {self.a or self.b}"
        text = f"{self.kind}: {self.name} "
        text += self.a if self.kind == "values" else f"{self.a} in A, {self.b} in B"
        if self.where is not None and self.values is not None:
            differ = "1 element differs" if self.elements == 1 else f"{self.elements} elements differ, the most"
            text += f": {differ} at {self.where} by {self.largest} ({self.values[0]} in A, {self.values[1]} in B)"
        return text


@dataclass(frozen=True)
class Differences:
    """What differs between two checkpoints.

    Attributes:
        a: the first one's file, or index.
        b: the second one's.
        compared: the number of names that A or B has.
        found: the differences, in the order of the names.
    """

    a: Path
    b: Path
    compared: int
    found: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.found

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it; a number that is not finite is its name, such as ``"inf"``."""
        found: dict[str, Any] = _as_json({**asdict(self), "a": str(self.a), "b": str(self.b), "equal": self.equal})
        return found

    def __str__(self) -> str:
        names = _count(self.compared, "tensor")
        end = f"equal: {names}" if self.equal else f"different: {len(self.found)} of {names}"
        return "\n".join([f"A: {self.a}", f"B: {self.b}", *map(str, self.found), end])


def show(path: StrPath, *, norms: bool = False) -> Contents:
    """What is in a checkpoint; no tensor is read unless norms are asked for, and then a part at a time.

    Args:
        path: a safetensors file, an index of several, the name under which several were saved, or a folder.
        norms: compute the 2-norm of each tensor.

    Raises:
        CheckpointError: there is no such file, or one is damaged or missing.
        ImportError: the safetensors library is not installed.
    """
    with Reader(Path(path)) as reader:
        tensors = [
            StoredTensor(
                name,
                _word(reader.dtypes[name]),
                shape,
                math.prod(shape) * reader.dtypes[name].itemsize,
                reader.file_of[name].name,
                _norm(reader, name) if norms else None,
            )
            for name, shape in ((name, reader.shapes[name]) for name in sorted(reader.shapes, key=_numbered))
        ]
        return Contents(reader.path, tuple(tensors), dict(reader.metadata), _tied(reader), _optimizer(reader))


def diff(a: StrPath, b: StrPath, *, optimizer: bool = False) -> Differences:
    """What differs between two checkpoints, by name; a part of one tensor is read at a time.

    Values of one dtype are compared bit by bit: NaN equals NaN, and 0.0 is not -0.0. Values of different dtypes are
    compared as numbers. A tied tensor is compared under each of its names that the other checkpoint has stored.
    Metadata is not compared.

    Args:
        a: as for `show`.
        b: likewise.
        optimizer: compare the optimizer states beside the weights, too.

    Raises:
        CheckpointError: there is no such file, or one is damaged or missing, or without optimizer state if asked for.
        ImportError: the safetensors library is not installed.
    """
    with Reader(Path(a)) as first, Reader(Path(b)) as second:
        compared, found = _compare(first, second)
        if optimizer:
            with Reader(_optimizer_path(first)) as state, Reader(_optimizer_path(second)) as other:
                more, states = _compare(state, other)
            compared, found = compared + more, [*found, *states]
        return Differences(first.path, second.path, compared, tuple(found))


def _compare(first: Reader, second: Reader) -> tuple[int, list[Difference]]:
    """How many names there are, and what differs."""
    aliases, others = _tied(first), _tied(second)
    names = sorted({*first.shapes, *second.shapes}, key=_numbered)
    found, done = [], set[tuple[str, str]]()
    for name in names:
        a, b = aliases.get(name, name), others.get(name, name)
        if (a, b) not in done:
            done.add((a, b))
            found += list(_differences(name, first, a, second, b))
    return len(names), found


def _differences(name: str, first: Reader, a: str, second: Reader, b: str) -> Iterator[Difference]:
    ours, theirs = _described(first, a), _described(second, b)
    if not ours or not theirs:
        yield Difference(name, "only in B" if not ours else "only in A", ours, theirs)
    elif first.shapes[a] != second.shapes[b]:
        yield Difference(name, "shape", ours, theirs)
    else:
        elements, largest, where, values = _values(first, a, second, b)
        if ours != theirs:
            yield Difference(name, "dtype", ours, theirs, elements, largest, where, values)
        elif elements:
            yield Difference(name, "values", ours, theirs, elements, largest, where, values)


def _values(
    first: Reader, a: str, second: Reader, b: str
) -> tuple[int, float, tuple[int, ...] | None, tuple[str, str] | None]:
    """Elements that differ, the largest difference, where it is, and what is there."""
    elements, largest = 0, -1.0
    where: tuple[int, ...] | None = None
    values: tuple[str, str] | None = None
    for start, stop in _spans(first.shapes[a]):
        ours, theirs = first.rows(a, start, stop), second.rows(b, start, stop)
        same = _same(ours, theirs)
        if same.all():
            continue
        elements += int((~same).sum())
        distance = torch.where(same, -1.0, _distance(ours, theirs))
        position = int(distance.argmax())
        if float(distance.flatten()[position]) > largest:
            largest = float(distance.flatten()[position])
            index = [int(i) for i in torch.unravel_index(torch.tensor(position), ours.shape)]
            values = (str(ours[tuple(index)].item()), str(theirs[tuple(index)].item()))
            where = (index[0] + start, *index[1:]) if index else ()
    return elements, max(largest, 0.0), where, values


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements are equal: in their bits, or where the dtypes differ in their values."""
    if a.dtype != b.dtype:
        x, y = _wide(a), _wide(b)
        return (x == y) | (x.isnan() & y.isnan())
    bits = _BITS[a.dtype.itemsize]
    return a.contiguous().view(bits) == b.contiguous().view(bits)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The absolute difference of each element, in float64."""
    if a.dtype == b.dtype == torch.int64:  # of which float64 does not have all
        distance = (torch.maximum(a, b) - torch.minimum(a, b)).double()
        return torch.where(distance < 0, distance + 2.0**64, distance)
    x, y = _wide(a), _wide(b)
    return torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs()).nan_to_num(math.inf, math.inf)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _norm(reader: Reader, name: str) -> float:
    total = 0.0
    for start, stop in _spans(reader.shapes[name]):
        part = float(torch.linalg.vector_norm(_wide(reader.rows(name, start, stop))))
        total = math.nan if math.isnan(part) or math.isnan(total) else math.hypot(total, part)
    return total


def _spans(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Intervals of the first dimension with at most `_CHUNK` elements, or one row."""
    rows = shape[0] if shape else 1
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _tied(reader: Reader) -> dict[str, str]:
    found: dict[str, str] = reader.json("tied", dict)
    return found


def _optimizer_path(reader: Reader) -> Path:
    name = reader.metadata.get("optimizer")
    if name is None:
        raise CheckpointError(f"'{reader.path}' has no optimizer state: its metadata names no file with it")
    if Path(name).name != name:
        raise CheckpointError(f"the metadata of '{reader.path}' has 'optimizer' = {name!r}, expected a file beside it")
    return reader.path.with_name(name)


def _optimizer(reader: Reader) -> StoredState | None:
    name = reader.metadata.get("optimizer")
    if name is None:
        return None
    try:
        with Reader(_optimizer_path(reader)) as state:
            states: dict[str, int] = {}
            for each in state.shapes:
                key = each.rpartition("/")[2]
                states[key] = states.get(key, 0) + 1
            nbytes = sum(math.prod(shape) * state.dtypes[each].itemsize for each, shape in state.shapes.items())
            found: list[dict[str, Any]] = state.json("param_groups", list)
            groups = [{**group, "params": len(group.get("params", ()))} for group in found]
            return StoredState(name, dict(sorted(states.items())), nbytes, groups)
    except CheckpointError as error:
        return StoredState(name, {}, 0, [], str(error))


def _optimizer_lines(state: StoredState) -> list[str]:
    if state.error is not None:
        return [f"optimizer: {state.error}"]
    lines = [f"optimizer: {state.nbytes} bytes in {state.file}"]
    lines += [f"optimizer: {key} of {_count(count, 'parameter')}" for key, count in state.states.items()]
    for i, group in enumerate(state.param_groups):
        others = ", ".join(f"{key} = {value}" for key, value in group.items() if key != "params")
        lines.append(f"optimizer: group {i} of {_count(group['params'], 'parameter')}: {others}")
    return lines


def _numbered(name: str) -> list[tuple[int, str]]:
    """What names are sorted by: the numbers in them as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _described(reader: Reader, name: str) -> str:
    return f"{_word(reader.dtypes[name])} {reader.shapes[name]}" if name in reader.shapes else ""


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _as_json(thing: Any) -> Any:
    """The same, with names for the numbers that JSON does not have."""
    if isinstance(thing, dict):
        return {key: _as_json(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_as_json(value) for value in thing]
    return str(thing) if isinstance(thing, float) and not math.isfinite(thing) else thing

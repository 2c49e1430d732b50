"""What FSDP2 cannot shard or would shard wrongly, found before anything is sharded.

Torch finds some of it at the first forward, by an AssertionError that names no parameter, and some never: a parameter
that two units share becomes two parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ds_z3leaf._always_called import always_calls
from ds_z3leaf._flags import never_called
from ds_z3leaf._sizes import full_shape, size_of
from ds_z3leaf.errors import LeafShardError, LeafValueError

_SHOWN = 4  # parameters in a message
_EXPERT = re.compile(r"expert", re.I)
Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class PlannedUnit:
    """A module that is to become a unit.

    Attributes:
        kind: ``leaf``, ``layer`` or ``root``.
        name: its name in the model.
        module: the module.
    """

    kind: str
    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({type(self.module).__name__})"


def check_units(
    model: nn.Module, units: Iterable[PlannedUnit], mixed_dtypes: object, options: Mapping[str, Any]
) -> dict[int, list[nn.Module]]:
    """Check every parameter of every unit; inner units come before those around them.

    Args:
        mixed_dtypes: ``raise`` or ``separate``; see `ds_z3leaf.fully_shard_leaves`.
        options: keywords of ``fully_shard``.

    Returns:
        By id of the unit's module, the children that become units of their own before it.

    Raises:
        LeafShardError, LeafValueError: see `ds_z3leaf.fully_shard_leaves`.
    """
    if mixed_dtypes not in ("raise", "separate"):
        raise LeafValueError(f'mixed_dtypes is {mixed_dtypes!r}: pass "raise" or "separate"')
    ignored = {id(param) for param in options.get("ignored_params") or ()}
    _check_wrappers(model)
    planned = list(units)
    roots = {id(unit.module) for unit in planned}
    owners: dict[int, tuple[PlannedUnit, str]] = {}  # by id of the parameter
    children: dict[int, list[nn.Module]] = {}
    for unit in planned:
        params = [named for named in _held(unit.name, unit.module, roots) if id(named[1]) not in ignored]
        for name, param in params:
            _check_param(unit, name, param, options)
            first, other = owners.setdefault(id(param), (unit, name))
            if first is not unit:
                raise _shared(unit, name, first, other)
        groups = _dtypes(params)
        children[id(unit.module)] = _separate(unit, groups, mixed_dtypes) if len(groups) > 1 else []
    for name, param in [] if id(model) in roots else _held("", model, roots):
        if id(param) in owners:
            raise _shared(None, name, *owners[id(param)])
    return children


def _held(name: str, module: nn.Module, roots: set[int]) -> list[Named]:
    """The parameters of a module and of what is below it, each once, without those below other units."""
    found: dict[int, Named] = {}
    stack, seen = [(name, module)], {id(module)}
    while stack:
        name, module = stack.pop()
        prefix = f"{name}." if name else ""
        for part, param in module._parameters.items():
            if param is not None:
                found.setdefault(id(param), (prefix + part, param))
        for part, child in reversed(module._modules.items()):
            if child is not None and id(child) not in seen and id(child) not in roots:
                seen.add(id(child))
                stack.append((prefix + part, child))
    return list(found.values())


def _shared(unit: PlannedUnit | None, name: str, first: PlannedUnit, other: str) -> LeafShardError:
    where = f"{unit}" if unit is not None else "what is around"
    return LeafShardError(
        f"{first} and {where} share a parameter, {other!r} = {name!r}: FSDP2 would make two parameters of it, trained "
        "apart. Take a leaf that holds both, or give one of them a copy"
    )


def _check_wrappers(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise LeafShardError(
                f"{name!r} is wrapped by FSDP1 (FullyShardedDataParallel): unwrap it, FSDP2 shards plain modules"
            )


def _check_param(unit: PlannedUnit, name: str, param: nn.Parameter, options: Mapping[str, Any]) -> None:
    from torch.distributed.tensor import DTensor

    problem = None
    if hasattr(param, "ds_id"):
        problem = "is partitioned by DeepSpeed ZeRO-3: build the model without zero.Init, or train by DeepSpeed"
    elif getattr(param, "_fsdp_flattened", False):
        problem = "is flattened by FSDP1 (FlatParameter): shard the plain module"
    elif isinstance(param, UninitializedParameter):
        problem = "has no shape yet: run the lazy modules once"
    elif param.ndim == 0:
        problem = "is a scalar, which FSDP2 cannot shard: give it the shape (1,)"
    elif param.numel() == 0 and param.requires_grad:
        problem = f"is empty, {tuple(param.shape)}, and FSDP2 cannot reduce its gradient: freeze or remove it"
    elif isinstance(param, DTensor):
        problem = _dtensor_problem(param, options)
    elif not param.is_contiguous():
        problem = f"is not contiguous (strides {param.stride()}), which FSDP2 does not take: make it contiguous()"
    if problem is None:
        problem = _quantised_problem(param, options)
    if problem is not None:
        raise LeafShardError(f"{unit}: parameter {name!r} {problem}")


def _quantised_problem(param: nn.Parameter, options: Mapping[str, Any]) -> str | None:
    dtype = param.dtype
    float8 = dtype.is_floating_point and dtype.itemsize == 1
    if not float8 and (dtype.is_floating_point or dtype.is_complex):
        return None
    policy = options.get("mp_policy")
    cast = getattr(policy, "param_dtype", None)
    if param.requires_grad:
        return f"is {dtype} and has a gradient, which FSDP2 cannot reduce: freeze it or keep it in bfloat16"
    if type(param) not in (nn.Parameter, torch.Tensor) and not hasattr(param, "fsdp_pre_all_gather"):
        return (
            f"is {dtype} in a {type(param).__name__}, of which FSDP2 keeps the numbers only and loses the scales: "
            "pass it in ignored_params, or quantise after sharding"
        )
    if not float8 and _torch_version() < (2, 13):  # 2.11 fails, 2.13 shards them; 2.12 was not tried
        return f"is {dtype}, which FSDP2 of torch {torch.__version__} cannot shard: pass it in ignored_params"
    if cast is not None and float8:
        return f"is {dtype}, and mp_policy would cast it to {cast} when it is gathered: pass it in ignored_params"
    return None


def _torch_version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def _dtensor_problem(param: Any, options: Mapping[str, Any]) -> str | None:
    """What is wrong with a parameter that is a DTensor already; tensor parallelism beside FSDP2's mesh is right."""
    if options.get("dp_mesh_dims") is not None:
        return None  # one mesh for all: torch checks the placements itself
    own, mesh = param.device_mesh, options.get("mesh")
    shown = (
        f"is a DTensor already, {tuple(param.placements)} on a mesh {tuple(own.mesh.shape)} {own.mesh_dim_names or ''}"
    )
    fix = 'pass the data-parallel part of the same mesh, mesh=mesh_2d["dp"], where mesh_2d["tp"] is the parameter\'s'
    if mesh is None:
        return f"{shown}, and no mesh is given: {fix}"
    names, own_names = mesh.mesh_dim_names or (), own.mesh_dim_names or ()
    if not names or not own_names or _root(mesh) is None or _root(mesh) != _root(own):
        return f"{shown}, which is not of one mesh with that of fully_shard, {names or 'without names'}: {fix}"
    if set(names) & set(own_names):
        return f"{shown}, which is the mesh of fully_shard too: it is sharded already; shard every parameter once"
    if own.ndim > 2:
        return f"{shown}, and FSDP2 takes two axes beside its own at most"
    if not param.to_local().is_contiguous():
        return f"{shown}, and its local part is not contiguous"
    return None


def _root(mesh: Any) -> Any:
    """The mesh that this one was cut from; torch moved the method."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed import device_mesh

    resources = getattr(device_mesh, "_mesh_resources", None)
    return resources.get_root_mesh(mesh) if resources is not None else None


def _dtypes(params: Iterable[Named]) -> dict[torch.dtype, list[Named]]:
    """The trainable parameters by dtype, the largest group first. FSDP2 does not mind the others."""
    groups: dict[torch.dtype, list[Named]] = {}
    for name, param in params:
        if param.requires_grad:
            groups.setdefault(param.dtype, []).append((name, param))
    sizes = {dtype: size_of(param for _, param in group).elements for dtype, group in groups.items()}
    return dict(sorted(groups.items(), key=lambda item: -sizes[item[0]]))


def _separate(unit: PlannedUnit, groups: dict[torch.dtype, list[Named]], mixed_dtypes: object) -> list[nn.Module]:
    """The children that hold the parameters of the minority, if each may be a unit of its own."""
    major, *minor = groups
    odd = [named for dtype in minor for named in groups[dtype]]
    listed = ", ".join(f"{name!r} ({param.dtype})" for name, param in odd[:_SHOWN])
    listed += f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    said = (
        f"{unit} holds trainable parameters of several dtypes, and an FSDP2 unit takes one: "
        f"{len(groups[major])} are {major}, but {listed}"
    )
    cast = (
        f"cast them (.to({major}), or all to torch.float32 with MixedPrecisionPolicy(param_dtype=...)), or freeze them"
    )
    if mixed_dtypes == "raise":
        raise LeafShardError(f'{said}: {cast}, or pass mixed_dtypes="separate" for a unit of their own')
    prefix = f"{unit.name}." if unit.name else ""
    parts = dict.fromkeys(name[len(prefix) :].partition(".")[0] for name, _ in odd)
    separate = []
    for part in parts:
        child = unit.module._modules.get(part)
        problem = _not_alone(unit, part, child, groups)
        if problem or child is None:
            raise LeafShardError(f"{said}. {prefix + part!r} cannot be a unit of its own: {problem}; {cast}")
        separate.append(child)
    return separate


def _not_alone(
    unit: PlannedUnit, part: str, child: nn.Module | None, groups: dict[torch.dtype, list[Named]]
) -> str | None:
    """Why a child may not be a unit inside the unit."""
    if child is None:
        return "it is a parameter, no child"
    if never_called(child):
        return f"a {type(child).__name__} is never called"
    inside = {id(param) for param in child.parameters()}
    held = [str(dtype) for dtype, group in groups.items() if any(id(param) in inside for _, param in group)]
    if len(held) > 1:
        return f"it holds {' and '.join(held)} itself"
    alike = [
        name
        for name, other in unit.module._modules.items()
        if other is not None and other is not child and type(other) is type(child) and _shapes(other) == _shapes(child)
    ]
    if _EXPERT.search(part) or _EXPERT.search(type(child).__name__) or (alike and part[-1:].isdigit()):
        return "it is an expert, which not every rank calls"
    if not always_calls(unit.module, part):
        return f"{type(unit.module).__name__}.forward does not show that every rank calls it"
    return None


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [full_shape(param) for param in module.parameters()]

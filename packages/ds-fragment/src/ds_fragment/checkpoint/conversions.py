"""What transformers 5 renames and computes where it reads a file, as one tensor of all experts of a layer.

Files on the hub keep the names, and the tensors, that a model had when it was published. transformers has a table of
what became of them, which it applies in ``from_pretrained``, and the other way round in ``save_pretrained``. The table
and its operations are used as they are; transformers is never imported, as nobody has a model of its without that.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ds_fragment.checkpoint.files import Made, Reader
from ds_fragment.engines.loaded import is_a
from ds_fragment.errors import CheckpointError


@dataclass
class Conversions:
    """What becomes of tensors of a file.

    Attributes:
        renamed: by name in the file, the name in the model.
        made: by name in the model, tensors that are computed from those of the file.
        used: names of the file from which they are.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def conversions(model: nn.Module, reader: Reader, names: Collection[str], known: Collection[str]) -> Conversions:
    """What transformers makes of tensors of a file that the model does not have as they are.

    Args:
        model: the user's own; if it is not one of transformers 5, there is nothing to convert.
        reader: the file.
        names: those of the tensors, in the file.
        known: the names that the model has.

    Raises:
        CheckpointError: transformers cannot convert them.
    """
    table, core = (sys.modules.get(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading"))
    if not names or table is None or core is None or not is_a(model, "transformers.modeling_utils", "PreTrainedModel"):
        return Conversions()
    try:
        return _convert(_on_meta(model), reader, names, known, table, core)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"'{reader.path}' has {len(names)} tensors, such as '{next(iter(names))}', that the model does not have, "
            f"and transformers cannot convert them ({type(error).__name__}: {error}): save the model with save_full, "
            "or pass map_names, with which nothing is converted"
        ) from error


def _on_meta(model: Any) -> Any:
    """The same model without values, and of its own class, which the table goes by; FSDP2 makes subclasses."""
    own = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))
    with torch.device("meta"):
        return own(copy.deepcopy(model.config))


def _convert(
    model: Any, reader: Reader, names: Collection[str], known: Collection[str], table: Any, core: Any
) -> Conversions:
    found, steps = Conversions(), table.get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, core.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, core.WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, list[tuple[str, str]]] = {}  # by the first name that is made: patterns, and names in the file
    targets = dict.fromkeys(known, True)
    for name in sorted(names, key=core.dot_natural_key):
        new, pattern = core.rename_source_key(name, renamings, converters, model.base_model_prefix, targets)
        if new in targets and pattern is not None:
            groups.setdefault(new, []).append((pattern, name))
        elif new in targets and new != name:
            found.renamed[name] = new
    for first, sources in groups.items():
        used = {name for _, name in sources}

        def make(
            give: Callable[[str], torch.Tensor], first: str = first, sources: list[tuple[str, str]] = sources
        ) -> dict[str, torch.Tensor]:
            converter = copy.deepcopy(of_pattern[sources[0][0]])
            for pattern, name in sources:
                converter.add_tensor(first, name, pattern, partial(give, name))
            made = converter.convert(first, model=model, config=model.config)
            return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

        try:
            meta = make(lambda name: torch.empty(reader.shapes[name], dtype=reader.dtypes[name], device="meta"))
        except Exception as error:
            raise CheckpointError(
                f"'{reader.path}' has {len(sources)} tensors, such as '{sources[0][1]}', of which transformers cannot "
                f"make '{first}', as if some were missing: {type(error).__name__}: {error}"
            ) from error
        if used.isdisjoint(meta) and not meta.keys().isdisjoint(reader.shapes):
            continue  # the file has both
        for name, tensor in meta.items():
            found.made[name] = Made(tuple(tensor.shape), tensor.dtype, partial(_one, make, reader, name))
        found.used |= used
    return found


def _one(make: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]], reader: Reader, name: str) -> Any:
    return make(reader.tensor)[name]

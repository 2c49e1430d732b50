"""Read the ``leaf_module`` section of a ZeRO configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from ds_z3leaf.errors import LeafTypeError, LeafValueError

# What DeepSpeed flags when the section names no classes (its 0.19).
DEFAULT_CLASSES = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)
_FIELDS = ("classes", "names", "name_suffixes")


@dataclass(frozen=True)
class LeafConfig:
    """The section, checked. `default_classes` are those of `classes` that need not be in the model."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    name_suffixes: tuple[str, ...]

    @property
    def default_classes(self) -> frozenset[str]:
        """DeepSpeed's default classes, if they are all that is named."""
        return frozenset(DEFAULT_CLASSES if set(self.classes) == set(DEFAULT_CLASSES) else ())


def read_config(section: object) -> LeafConfig:
    """Take the fields of an object or a mapping.

    Raises:
        LeafTypeError: a field is no list of strings, or the object has none of the fields.
        LeafValueError: a mapping has a key that is no field.
    """
    if isinstance(section, Mapping):
        for key in section:
            if key not in _FIELDS:
                near = get_close_matches(str(key), _FIELDS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise LeafValueError(f"leaf_cfg has the key {key!r}, which is none of {_FIELDS}{hint}")
        fields = {name: section.get(name) for name in _FIELDS}
        if "classes" not in section:
            fields["classes"] = DEFAULT_CLASSES
    else:
        if not any(hasattr(section, name) for name in _FIELDS):
            raise LeafTypeError(f"leaf_cfg is a {type(section).__name__} without {_FIELDS}: pass a mapping with them")
        fields = {name: getattr(section, name, None) for name in _FIELDS}
    return LeafConfig(**{name: _strings(name, value) for name, value in fields.items()})


def _strings(name: str, value: object) -> tuple[str, ...]:
    entries = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(entries, Iterable):
        raise LeafTypeError(f"leaf_cfg.{name} is a {type(value).__name__}: pass a list of strings")
    listed = list(entries)
    for entry in listed:
        if not isinstance(entry, str):
            raise LeafTypeError(f"leaf_cfg.{name} holds a {type(entry).__name__}: pass a list of strings")
    return tuple(dict.fromkeys(listed))

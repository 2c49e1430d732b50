"""Sizes and dtypes as people write them."""

from __future__ import annotations

import re

import torch

from ds_fragment.errors import InvalidValueError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power for power, prefix in enumerate("KMGT", 1) for end, base in (("B", 1000), ("IB", 1024))
}


def bytes_of(size: str | int | None) -> int:
    """The bytes of ``"5GB"``, ``"500MiB"`` or a number; more than there are of None.

    >>> bytes_of("5GB"), bytes_of("1KiB")
    (5000000000, 1024)

    Raises:
        InvalidValueError: it is not of that form.
    """
    if size is None:
        return 1 << 62
    matched = re.fullmatch(r"(\d+)\s*([A-Z]*)", str(size).strip().upper())
    if matched is None or matched[2] not in _UNITS or not int(matched[1]):
        raise InvalidValueError(f"the size is {size!r}, expected a number of bytes as '5GB' or '500MiB'")
    return int(matched[1]) * _UNITS[matched[2]]


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of ``"float32"``, ``"torch.float32"`` or ``"fp32"``.

    Raises:
        InvalidValueError: it is not one that a model is written with.
    """
    name = str(dtype).removeprefix("torch.").lower()
    found = DTYPES.get(_SHORT.get(name, name))
    if found is None:
        raise InvalidValueError(f"dtype is {dtype!r}, expected one of {', '.join([*DTYPES, *_SHORT])}")
    return found

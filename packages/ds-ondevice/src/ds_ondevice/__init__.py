"""Build a PyTorch model on any device and dtype, and materialize it from meta.

``OnDevice`` decides where construction puts tensors; ``materialize`` gives a module on meta real memory and values.
"""

from __future__ import annotations

from ds_ondevice import init_on_device
from ds_ondevice.__about__ import __version__
from ds_ondevice._load import LoadReport, load_into
from ds_ondevice._materialize import MaterializeReport, is_deferred, materialize
from ds_ondevice.errors import (
    LoadError,
    MaterializeError,
    MetaValueError,
    RecordingMismatchError,
    ReplayError,
    UnrestorableError,
)
from ds_ondevice.init_on_device import OnDevice

__all__ = [
    "LoadError",
    "LoadReport",
    "MaterializeError",
    "MaterializeReport",
    "MetaValueError",
    "OnDevice",
    "RecordingMismatchError",
    "ReplayError",
    "UnrestorableError",
    "__version__",
    "init_on_device",
    "is_deferred",
    "load_into",
    "materialize",
]


def __dir__() -> list[str]:
    """The public names and those with an underscore."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})

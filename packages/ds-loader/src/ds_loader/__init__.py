"""An endless, resumable, reshuffling data loader for PyTorch."""

from __future__ import annotations

from ds_loader import dataloader
from ds_loader.__about__ import __version__
from ds_loader._order import Coverage
from ds_loader.dataloader import RepeatingLoader
from ds_loader.errors import EmptyLoaderError, LoaderStateError, LoaderWarning, OneShotLoaderError, UnevenRanksError

__all__ = [
    "Coverage",
    "EmptyLoaderError",
    "LoaderStateError",
    "LoaderWarning",
    "OneShotLoaderError",
    "RepeatingLoader",
    "UnevenRanksError",
    "__version__",
    "dataloader",
]


def __dir__() -> list[str]:
    """The public names and those with an underscore."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})

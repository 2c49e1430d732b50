"""An endless, resumable, reshuffling data loader for PyTorch."""

from __future__ import annotations

from ds_loader.__about__ import __version__
from ds_loader.dataloader import RepeatingLoader
from ds_loader.errors import EmptyLoaderError, LoaderStateError, OneShotLoaderError

__all__ = [
    "EmptyLoaderError",
    "LoaderStateError",
    "OneShotLoaderError",
    "RepeatingLoader",
    "__version__",
]

"""Put these packages' modules under DeepSpeed, in the place of its own `deepspeed.utils` modules."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ds_train_utils._exports import MODULES

VERIFIED = ("0.16.9", "0.17.6", "0.18.9", "0.19.6", "0.19.8")
"""The DeepSpeed versions on which the project's drop-in tests passed: `INCUMBENTS` in noxfile.py."""

_PREFIX = "deepspeed.utils."
_TARGETS = {_PREFIX + name: home for name, home in MODULES.items() if name != "dataloader"}

# What DeepSpeed's checkpoints hold objects of. They keep the name that they have in DeepSpeed, so that an unmodified
# DeepSpeed loads what was saved on these modules.
_PICKLED = {f"{_PREFIX}tensor_fragment": ("fragment_address", "tensor_fragment")}


class InstallError(RuntimeError):
    """These modules cannot be put under DeepSpeed, in this process or any more."""


def install() -> None:
    """Make DeepSpeed itself use these packages: call it before anything imports DeepSpeed.

    From then on ``import deepspeed`` finds the modules of this package where it looks for ``deepspeed.utils.groups``,
    ``logging``, ``comms_logging``, ``nvtx``, ``init_on_device``, ``tensor_fragment``, ``mixed_precision_linkage``,
    ``module_utils``, ``timer``, ``z3_leaf_module``, ``numa`` and ``zero_to_fp32``. Every rank calls it; it does not
    communicate. A second call does nothing. `RepeatingLoader` stays DeepSpeed's own, because this package's gives every
    epoch an order of its own, and a pipeline engine would train on other batches.

    Warns:
        UserWarning: the DeepSpeed that is installed is not one that this was verified on (0.16.9, 0.17.6, 0.18.9,
            0.19.6 and 0.19.8).

    Raises:
        InstallError: DeepSpeed is not installed, or was imported already.
    """
    if any(isinstance(finder, _Redirect) for finder in sys.meta_path):
        return
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise InstallError("DeepSpeed is not installed: there is nothing to put these modules under") from None
    loaded = sorted(name for name in sys.modules if name == "deepspeed" or name.startswith("deepspeed."))
    if loaded:
        raise InstallError(
            f"DeepSpeed was imported already ({len(loaded)} modules, such as {loaded[0]}) and holds its own utilities: "
            "call ds_train_utils.install() before the first import of deepspeed, and before libraries that import it "
            "(accelerate, transformers and Lightning do so when they find it)"
        )
    if version.partition("+")[0] not in VERIFIED:
        warnings.warn(
            f"ds_train_utils.install() was verified on DeepSpeed {', '.join(VERIFIED)}, not on the {version} that is "
            "installed here",
            stacklevel=2,
        )
    sys.meta_path.insert(0, _Redirect())


class _Redirect(MetaPathFinder, Loader):
    """Finds a `deepspeed.utils` module of DeepSpeed's that this project has, and loads the project's own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the modules that are replaced, None for all others."""
        return importlib.util.spec_from_loader(fullname, self) if fullname in _TARGETS else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the replacement where Python looks for what it has just loaded."""
        home = sys.modules[module.__name__] = importlib.import_module(_TARGETS[module.__name__])
        for name in _PICKLED.get(module.__name__, ()):
            getattr(home, name).__module__ = module.__name__

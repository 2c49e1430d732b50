"""Everything that `deepspeed.utils` offers, from seven small packages, each loaded on first use.

Importing this package imports neither torch nor any of the seven. The names are listed in one place, ``__init__.pyi``,
which type checkers read and which `_lazy` reads at run time.

>>> import ds_train_utils
>>> "safe_get_full_fp32_param" in dir(ds_train_utils)
True
"""

from ds_train_utils._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)

"""Every name that `deepspeed.utils` exports, from seven small packages, each loaded on first use.

Importing this package imports neither torch nor any of the seven.

>>> import ds_train_utils
>>> "safe_get_full_fp32_param" in dir(ds_train_utils)
True
"""

from ds_train_utils import _lazy
from ds_train_utils._exports import EXPORTS as _EXPORTS

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = _lazy.lazy(__name__, _EXPORTS)

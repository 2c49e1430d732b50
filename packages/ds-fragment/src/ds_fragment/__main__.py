"""``python -m ds_fragment`` is the command ``ds-fragment``; alone it says which kernels are in use here, and why."""

from __future__ import annotations

import sys

from ds_fragment.commands import main

if __name__ == "__main__" and (status := main()):
    sys.exit(status)

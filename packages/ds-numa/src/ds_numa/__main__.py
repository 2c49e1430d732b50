"""``python -m ds_numa`` is the ``ds-numa`` command."""

import sys

from ds_numa._cli import main

if __name__ == "__main__":
    sys.exit(main())

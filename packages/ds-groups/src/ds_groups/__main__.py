"""``python -m ds_groups`` is the ``ds-groups`` command."""

import sys

from ._rehearse.command import main

if __name__ == "__main__":
    sys.exit(main())

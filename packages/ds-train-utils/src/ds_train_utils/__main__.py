"""``python -m ds_train_utils`` is the ``ds-train-utils`` command."""

import sys

from ds_train_utils._report import main

sys.exit(main())

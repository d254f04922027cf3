"""`python -m mlxq` is `mlxq`."""

import sys

from mlxq.cli import main

sys.exit(main())

"""``python -m flashx.bench``."""

import sys

from .cli import main

sys.exit(main())

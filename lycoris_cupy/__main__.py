"""`python -m lycoris_cupy`: the command line."""

import sys

from .cli import main

sys.exit(main())

"""`python -m distill`, the same as `distill`."""

import sys

from distill.cli import main

sys.exit(main())

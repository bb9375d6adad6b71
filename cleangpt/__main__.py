"""`python -m cleangpt` is `cleangpt`, so that a launcher such as torchrun can start it as a module."""

import sys

from cleangpt.cli import main

sys.exit(main())

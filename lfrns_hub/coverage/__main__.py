"""`python -m lfrns_hub.coverage`: the same as `lfrns coverage`."""

import sys

from lfrns_hub.coverage.command import main
from lfrns_hub.recipe import run

run(lambda: sys.exit(main()))

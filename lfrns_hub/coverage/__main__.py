"""`python -m lfrns_hub.coverage`: the same as `lfrns coverage`."""

import sys

from lfrns_hub.coverage.command import main

sys.exit(main())

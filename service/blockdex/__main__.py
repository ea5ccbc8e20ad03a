"""`python -m blockdex`."""

from __future__ import annotations

import sys

from blockdex.cli.main import main

sys.exit(main())

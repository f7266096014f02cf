"""``python -m dflow``."""

from __future__ import annotations

import sys

from dflow.cli import main

if __name__ == "__main__":
    sys.exit(main())

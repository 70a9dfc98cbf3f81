"""Runs the `autoteardown` command as `python -m autoteardown`."""

from __future__ import annotations

import sys

from autoteardown.cli import main

if __name__ == "__main__":
    sys.exit(main())

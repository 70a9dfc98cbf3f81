"""A script, not a module: it ends the process when it is imported."""

import sys

sys.exit(3)

"""Runs a script with the SIGTERM handler that training scripts carry, which is the drill's control and the tests'.

handwritten.py SCRIPT [ARG]...
"""

import runpy
import sys

from autoteardown.drills.handwritten import install

if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")

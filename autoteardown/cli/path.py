"""`autoteardown path`: prints the folder whose `sitecustomize` starts the agent without an installation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import autoteardown


def injection_folder() -> Path | None:
    """The folder: inside the package when installed, next to it in a source tree; None if it is missing."""
    package = Path(autoteardown.__file__).resolve().parent
    for folder in (package / "_inject", package.parent / "sitecustomize"):
        if (folder / "sitecustomize.py").is_file():
            return folder
    return None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options: none."""
    parser.epilog = 'PYTHONPATH="$(autoteardown path)" AUTOTEARDOWN=1 python train.py'


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    folder = injection_folder()
    if folder is None:
        print(
            "autoteardown: this installation has no sitecustomize folder: install the package again",
            file=sys.stderr,
        )
        return 1
    print(folder)
    return 0

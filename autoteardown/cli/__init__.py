"""The command line `autoteardown COMMAND …`: parses the arguments and runs the command.

A command is a module of this package with `configure(parser)` and `run(args) -> int`, imported only when it is used.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

import autoteardown
from autoteardown.node.entry import printable

COMMANDS = {
    "doctor": "check whether the agent is active here, and say why if it is not",
    "ps": "list the armed ranks on this node, and whether their peers would be notified of an eviction",
    "drain": "signal the armed ranks on this node and wait until they have exited",
    "watch": "drain this node when the cloud announces the end of the machine",
    "drill": "start a small training job here, evict one of its ranks, and show what happens",
    "timeline": "draw the reports of a job as a page, a picture or a trace",
    "path": "print the folder to put on PYTHONPATH where the agent cannot be installed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="autoteardown", description=autoteardown.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"autoteardown {autoteardown.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # The main parser has no option with a value, so the first word without a dash is the command.
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            importlib.import_module(f"autoteardown.cli.{name}").configure(command)
    args = parser.parse_args(words)
    try:
        status = importlib.import_module(f"autoteardown.cli.{args.command}").run(args)
        sys.stdout.flush()
        return int(status)
    except BrokenPipeError:
        # `autoteardown ps | head`: the reader has closed the pipe.
        _discard_stdout()
        return 141
    except OSError as error:  # a full disk behind stdout; the command itself has done its work
        _discard_stdout()
        sys.stderr.write(f"autoteardown {args.command}: {printable(str(error))}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _prepare_streams() -> None:
    """Make stdout and stderr writable, also in a hook with closed streams or a locale that lacks some characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Redirect stdout to /dev/null; otherwise Python's flush at exit would report the error again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass

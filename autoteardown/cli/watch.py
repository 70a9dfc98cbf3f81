"""`autoteardown watch`: drains this node when the cloud announces the end of the machine."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from datetime import datetime, timezone
from typing import Any, Optional, TextIO

from autoteardown import settings, variables
from autoteardown.cloud_notice import choose, command, decisions, http, record
from autoteardown.cloud_notice.source import Source
from autoteardown.cloud_notice.watcher import Watcher
from autoteardown.node import drain, procfs
from autoteardown.node.entry import Entry, printable

SUMMARY = "drain this node when the cloud announces the end of the machine"
NOTHING_TO_WATCH = 2
"""Exit code where no notice can be expected; also that of a wrong option: a restart changes neither."""
_LEAD = 120.0
_INTERVAL = 5.0
_LAST_WORDS = 3.0  # seconds for the results of a drain, after the command has ended
_DAY = 86400


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--source",
        type=_source,
        default="auto",
        help=f"{choose.ALLOWED} (default: auto, by the machine's firmware)",
    )
    add(
        "--interval",
        type=_seconds,
        default=_INTERVAL,
        metavar="SECONDS",
        help="between two readings (default: 5)",
    )
    help_ = "begin the drain when the machine still runs this long (default: 120); a shorter notice is acted on at once"
    add("--lead", type=_seconds, default=_LEAD, metavar="SECONDS", help=help_)
    help_ = "time between a notice that names no time and the end (default: as the cloud documents it)"
    add("--notice", type=_seconds, metavar="SECONDS", help=help_)
    add("--rebalance", action="store_true", help="EC2: a rebalance recommendation is a notice, too")
    add(
        "--acknowledge",
        action="store_true",
        help="Azure: acknowledge the event after the drain; it starts at once",
    )
    add(
        "--endpoint",
        type=_endpoint,
        metavar="HOST[:PORT]",
        help="address of the metadata service, such as EC2's IPv6",
    )
    add(
        "--once",
        action="store_true",
        help="end after the first notice; default: stay, and drain later ranks, too",
    )
    add("--job", help="only the ranks of this job, as `ps` shows it")
    add("--dry-run", action="store_true", help="read the source once, list the ranks, and signal none")
    add("--json", action="store_true", help="print one JSON object a line")
    add(
        "argv",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="run this command, and drain its ranks only",
    )


def run(args: argparse.Namespace) -> int:
    """Watch.

    Returns:
        The command's exit code, if there is one. `--once`: 0 if every rank left cleanly or there was none, else 1.
        2 if no notice can be expected here. `--dry-run`: 0 if source and registry could be read, else 1.
    """
    words = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    out = _Output(args.json, sys.stderr if words else sys.stdout)
    found, refused = settings.load(os.environ)
    for line in refused:
        print(f"autoteardown: {line}", file=sys.stderr)
    try:
        source: Optional[Source] = choose.source(args.source, args.endpoint, args.rebalance)
    except choose.Nothing as nothing:
        out.say("nothing", str(nothing) + ("; the command runs without" if words else ""))
        if not words:
            return NOTHING_TO_WATCH
        source = None
    if words and args.dry_run:
        out.say("nothing", "--dry-run starts no command: leave one of them out")
        return NOTHING_TO_WATCH
    job = None if args.job is None else args.job.strip()[: variables.JOB_LENGTH]
    if args.dry_run and source is not None:
        return _dry_run(source, found, drain.Selection(job), out)

    mask = command.block()
    child = None
    if words:
        try:
            child = command.Command(words, mask)
        except OSError as error:
            out.say("nothing", f"{words[0]}: {error.strerror or error}")
            exists = shutil.which(words[0]) or os.path.exists(words[0])
            return command.NOT_EXECUTABLE if exists else command.NOT_FOUND
    watcher = None
    if source is not None:
        watcher = Watcher(
            source,
            decisions.Decisions(args.lead, args.notice, time.monotonic()),
            found.runtime_dir,
            found.signals[0],
            found.grace,
            max(0.05, args.interval),
            out.say,
            lambda step, seconds, ranks: record.write(found.report_dir, source.name, step, seconds, ranks),
            args.acknowledge,
        )
        watcher.selection = drain.Selection(job) if child is None else _Below(child.pid, job)
    if child is not None:
        return _with_command(child, watcher, args.once)
    return _alone(watcher, args.once) if watcher is not None else NOTHING_TO_WATCH


def _with_command(child: command.Command, watcher: Optional[Watcher], once: bool) -> int:
    if watcher is not None:
        threading.Thread(target=watcher.run, args=(once,), daemon=True).start()
    code = child.wait()
    if watcher is not None:
        watcher.stopping.set()
        if watcher.busy.acquire(timeout=_LAST_WORDS):  # a drain notices that its ranks have left
            watcher.busy.release()
    return code


def _alone(watcher: Watcher, once: bool) -> int:
    main = threading.get_ident()
    failed: list[BaseException] = []

    def watch() -> None:
        try:
            watcher.run(once)
        except BaseException as error:
            failed.append(error)
        finally:
            signal.pthread_kill(main, signal.SIGCHLD)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    while True:
        # As process 1, a sidecar would ignore a signal that has its default action.
        signum = signal.sigwaitinfo(command.taken()).si_signo
        if signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            return 0 if signum == signal.SIGTERM else 128 + signum
        if signum == signal.SIGCHLD:
            thread.join(1.0)
            if failed:
                raise failed[0]
            if not thread.is_alive():
                return 0 if watcher.clean else 1


class _Below(drain.Selection):
    """Selects the ranks that a command has started."""

    __slots__ = ("_pid",)

    def __init__(self, pid: int, job: Optional[str]) -> None:
        super().__init__(job)
        self._pid = pid

    def matches(self, record: Entry) -> bool:
        return super().matches(record) and (
            record.pid == self._pid or self._pid in procfs.ancestors(record.pid)
        )


class _Output:
    """Writes one line for each state, in text or JSON."""

    def __init__(self, as_json: bool, stream: TextIO) -> None:
        self._as_json, self._stream = as_json, stream

    def say(self, event: str, text: str, **fields: Any) -> None:
        """Write the line; a reader that has gone costs the line, not the watch."""
        line = f"autoteardown watch: {printable(text)}"
        if self._as_json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            line = json.dumps({"time": now, "event": event, "message": text, **fields})
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            pass


def _dry_run(source: Source, found: settings.Settings, selection: drain.Selection, out: _Output) -> int:
    problems: list[str] = []
    try:
        notice, _ = source.read(0.0)
        if notice is None:
            out.say("watching", f"{source.place} answers: there is no notice", notice=None, seconds=None)
        else:
            text = "not known when" if notice.seconds is None else f"in {notice.seconds:.0f} s"
            fields = {"notice": notice.text, "seconds": notice.seconds}
            out.say("notice", f"{source.place} answers: {notice.text}, {text}", **fields)
    except http.Unavailable as error:
        problems.append(f"{source.place} gives no usable answer: {error}")
    ranks = drain.would_signal(found.runtime_dir, selection, problems.append)
    for problem in problems:
        out.say("problem", problem)
    for rank in ranks:
        out.say(
            "rank", f"{drain.describe(rank)}: would be drained", pid=rank.pid, job=rank.job, rank=rank.rank
        )
    out.say("dry run", f"{len(ranks)} armed ranks would be drained; none was (--dry-run)", ranks=len(ranks))
    return 1 if problems else 0


def _source(text: str) -> str:
    if text not in ("auto", *choose.CLOUDS) and not (text.startswith("file:") and text[5:]):
        raise argparse.ArgumentTypeError(f"{text!r} is not {choose.ALLOWED}")
    return text


def _endpoint(text: str) -> tuple[str, int]:
    try:
        return http.address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HOST or HOST:PORT, with an IPv6 address in []"
        ) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _DAY:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_DAY}")
    return seconds

"""What a person sees while a drill runs: plain lines or, on a terminal with `rich`, the same with a live view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from autoteardown.drills import table
from autoteardown.drills.outcome import Outcome
from autoteardown.drills.scenario import Scenario

if TYPE_CHECKING:
    from autoteardown.drills.job import Job

_WIDTH = 12  # of the names of the protections


class Display:
    """Plain lines."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def line(self, text: str = "", style: str = "") -> None:
        """One line; `style` is for terminals."""
        self._out.write(f"{text}\n")
        self._out.flush()

    def scenario(self, scenario: Scenario, jobs: Sequence[Job]) -> None:
        """A scenario begins."""
        self.line()
        self.line(f"{scenario.name}: {scenario.title}", "bold")

    def say(self, label: str, text: str) -> None:
        """Something has happened to a job."""
        self.line(f"  {label:{_WIDTH}}  {text}")

    def tick(self, jobs: Sequence[Job]) -> None:
        """Time has passed."""

    def pause(self) -> None:
        """Nothing is going on for a while."""

    def outcome(self, outcome: Outcome) -> None:
        """A job is over."""
        self.line(f"  {outcome.label:{_WIDTH}}  {outcome.summary()}", "green" if outcome.clean else "red")

    def table(self, outcomes: Sequence[Outcome]) -> None:
        """All of them."""
        for text in table.lines(outcomes):
            self.line(text)


class RichDisplay(Display):
    """The same on a terminal."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console

        super().__init__(out)
        self._console = Console(file=out, highlight=False)
        self._live: Any = None

    def line(self, text: str = "", style: str = "") -> None:
        """Above the live view."""
        self._console.print(text, style=style or None, markup=False)

    def scenario(self, scenario: Scenario, jobs: Sequence[Job]) -> None:
        """The live view begins."""
        from rich.live import Live

        super().scenario(scenario, jobs)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._live.start()

    def say(self, label: str, text: str) -> None:
        """In colour."""
        style = "dim" if text.startswith(" ") else "yellow" if "SIG" in text else ""
        self.line(f"  {label:{_WIDTH}}  {text}", style)

    def tick(self, jobs: Sequence[Job]) -> None:
        """Renew the live view."""
        from rich.table import Table

        view = Table.grid(padding=(0, 2))
        for job in jobs:
            view.add_row("", f"[bold]{job.label}[/]", job.status)
        self._live.update(view)

    def pause(self) -> None:
        """The live view ends."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, outcomes: Sequence[Outcome]) -> None:
        """In colour."""
        from rich.table import Table
        from rich.text import Text

        view = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        for name in table.HEAD:
            view.add_column(name, overflow="fold", no_wrap=name != "exit codes")
        for row in table.rows(outcomes):
            good = row[2].text == "yes"
            styles = ["red" if cell.bad else "green" if good and cell is row[2] else "" for cell in row]
            view.add_row(*(Text(cell.text, style=style) for cell, style in zip(row, styles)))
        self._console.print(view)


def choose(out: TextIO) -> Display:
    """The best that this stream can show."""
    if out.isatty():
        try:
            return RichDisplay(out)
        except ImportError:
            pass
    return Display(out)

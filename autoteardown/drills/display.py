"""Shows the progress of a drill: plain lines or, on a terminal with `rich`, the same lines with a live view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from autoteardown.drills import table
from autoteardown.drills.outcome import Outcome
from autoteardown.drills.scenario import Scenario

if TYPE_CHECKING:
    from autoteardown.drills.job import Job

_WIDTH = 12  # of the protections' names, in characters


class Display:
    """Shows plain lines."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def line(self, text: str = "", style: str = "") -> None:
        """Show one line; `style` is used on terminals only."""
        self._out.write(f"{text}\n")
        self._out.flush()

    def scenario(self, scenario: Scenario, jobs: Sequence[Job]) -> None:
        """Show that a scenario begins."""
        self.line()
        self.line(f"{scenario.name}: {scenario.title}", "bold")

    def say(self, label: str, text: str) -> None:
        """Show an event of a job."""
        self.line(f"  {label:{_WIDTH}}  {text}")

    def tick(self, jobs: Sequence[Job]) -> None:
        """Update the live view, if there is one."""

    def pause(self) -> None:
        """End the live view, if there is one."""

    def outcome(self, outcome: Outcome) -> None:
        """Show the outcome of a job."""
        self.line(f"  {outcome.label:{_WIDTH}}  {outcome.summary()}", "green" if outcome.clean else "red")

    def table(self, outcomes: Sequence[Outcome]) -> None:
        """Show the table of all outcomes."""
        for text in table.lines(outcomes):
            self.line(text)


class RichDisplay(Display):
    """Shows lines in colour and a live view, with `rich`."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console

        super().__init__(out)
        self._console = Console(file=out, highlight=False)
        self._live: Any = None

    def line(self, text: str = "", style: str = "") -> None:
        """Show one line, above the live view."""
        self._console.print(text, style=style or None, markup=False)

    def scenario(self, scenario: Scenario, jobs: Sequence[Job]) -> None:
        """Show that a scenario begins, and start the live view."""
        from rich.live import Live

        super().scenario(scenario, jobs)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._live.start()

    def say(self, label: str, text: str) -> None:
        """Show an event of a job, in colour."""
        style = "dim" if text.startswith(" ") else "yellow" if "SIG" in text else ""
        self.line(f"  {label:{_WIDTH}}  {text}", style)

    def tick(self, jobs: Sequence[Job]) -> None:
        """Update the live view."""
        from rich.table import Table

        view = Table.grid(padding=(0, 2))
        for job in jobs:
            view.add_row("", f"[bold]{job.label}[/]", job.status)
        self._live.update(view)

    def pause(self) -> None:
        """End the live view."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, outcomes: Sequence[Outcome]) -> None:
        """Show the table of all outcomes, in colour."""
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
    """The best display for this stream."""
    if out.isatty():
        try:
            return RichDisplay(out)
        except ImportError:
            pass
    return Display(out)

"""Reads the `AUTOTEARDOWN_*` environment variables into `Settings`, with one line for each invalid value.

Every process that imports `signal` imports this, so it imports almost nothing itself (no dataclasses, enum, re,
typing).
"""

from __future__ import annotations

from autoteardown import variables
from autoteardown.switch import SWITCH, switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SWITCH", "VARIABLES", "Settings", "known", "load", "signal_name", "switch"]

_PREFIX = "AUTOTEARDOWN_"
# The part of the time that drain, abort and exit get at most under AUTOTEARDOWN_STEP_TIMEOUT=auto.
SAME_EVICTION = 2.0
"""Seconds after the first eviction signal in which another one is a repetition: platforms repeat themselves."""
_AUTO_SHARE = 11 / 24
_SAVING = 6.0  # seconds that `AUTOTEARDOWN_YIELD=auto` reserves for the agent's own work
_TIMEOUTS = ("STEP", "DRAIN", "DESTROY", "ABORT", "EXIT")
_ATTRIBUTES = {"YIELD": "yield_seconds"}  # attributes that are not the variable's name in lower case
# Variables with the job's name, the innermost launcher's first.
_JOB_IDS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "RAY_JOB_ID")


class Settings:
    """The validated settings, with the time-outs scaled to fit the grace period."""

    __slots__ = (
        "abort_timeout",
        "checkpoint",
        "destroy_timeout",
        "drain_timeout",
        "exit_code",
        "exit_timeout",
        "grace",
        "handlers",
        "hard",
        "job",
        "log",
        "log_format",
        "lost",
        "on_teardown",
        "peer_exit_code",
        "peers",
        "refused",
        "report_dir",
        "runtime_dir",
        "scaled",
        "signals",
        "sources",
        "step_auto",
        "step_timeout",
        "stop_at",
        "termination_log",
        "wanted",
        "yield_auto",
        "yield_seconds",
    )

    signals: tuple[int, ...]
    grace: float
    hard: float  # seconds after the signal when the process exits at the latest
    exit_code: int | None  # None: 128 + signal number
    peer_exit_code: int
    peers: bool
    stop_at: str  # "step" or "now"
    handlers: str  # "together" or "alone"
    lost: float | None  # seconds; None: for ever
    on_teardown: tuple[tuple[str, str], ...]  # module and function
    checkpoint: bool
    step_timeout: float
    step_auto: bool  # the time-out is what the grace period leaves
    drain_timeout: float
    destroy_timeout: float
    abort_timeout: float
    exit_timeout: float
    wanted: dict[str, float]  # the time-outs as they were given; STEP is below 0 for `auto`
    yield_seconds: float
    yield_auto: bool  # it is what the grace period leaves
    log: str  # "quiet", "info" or "debug"
    log_format: str  # "text" or "json"
    job: str | None  # the job's name, if it has one
    report_dir: str | None
    termination_log: str | None
    runtime_dir: str
    scaled: float  # the factor that the time-outs were multiplied by to fit; 1.0: unchanged
    refused: set[str]  # the variables whose value is invalid
    sources: dict[
        str, tuple[str | None, object]
    ]  # by variable: its value in the environment, the effective value

    def exit_code_for(self, signum: int | None) -> int:
        """The exit code of a rank that got this signal, or of one whose peer got it (None)."""
        if signum is None:
            return self.peer_exit_code
        return 128 + signum if self.exit_code is None else self.exit_code

    def exit_code_is_set(self, signum: int | None) -> bool:
        """Whether the environment gives that code, and a valid one: then it also replaces another program's code."""
        variable = _PREFIX + ("PEER_EXIT_CODE" if signum is None else "EXIT_CODE")
        return bool((self.sources[variable][0] or "").strip()) and variable not in self.refused

    def yield_within(self, hard: float) -> float:
        """`yield_seconds`, if the process has to exit in `hard` seconds and that is less than usual, or more."""
        if hard < self.hard:
            return min(self.yield_seconds, max(0.0, hard - _SAVING))
        return max(0.0, hard - _SAVING) if self.yield_auto else self.yield_seconds

    def timeouts_within(self, hard: float) -> dict[str, float]:
        """The time-outs of the phases by name, if the process has to exit in `hard` seconds."""
        return _fit(self.wanted, hard)[0]


def load(environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The effective settings, and one line for each invalid value, which was replaced by its default."""
    found = Settings()
    found.sources, found.refused = {}, set()
    problems: list[str] = []
    for name, (default, read, allowed, _) in variables.TABLE.items():
        variable = _PREFIX + name
        raw = environ.get(variable)
        # Templates leave empty values behind, which count as unset. Only for this variable, empty means off.
        given = raw is not None and (raw.strip() or name == "TERMINATION_LOG")
        try:
            value = read(raw.strip() if given and raw is not None else default)
        except ValueError:
            found.refused.add(variable)
            problems.append(f"{variable}={raw!r} is not {allowed}: using the default, {default}")
            value = read(default)
        setattr(found, _ATTRIBUTES.get(name, name.lower()), value)
        found.sources[variable] = (raw, value)
    found.job = found.job or _job(environ)
    _record(found, "JOB", found.job)
    found.hard = found.grace - 1.0
    found.yield_auto = found.yield_seconds < 0
    found.yield_seconds = (
        max(0.0, found.hard - _SAVING) if found.yield_seconds < 0 else min(found.yield_seconds, found.hard)
    )
    _record(found, "YIELD", found.yield_seconds)
    _scale(found)
    return found, problems


def automatic_step(seconds: float, drain: float, abort: float, exit_: float) -> tuple[float, float]:
    """How long an iteration is waited for under `AUTOTEARDOWN_STEP_TIMEOUT=auto`.

    Args:
        seconds: what is left until the hard deadline.
        drain, abort, exit_: the time-outs of the phases that follow.

    Returns:
        Seconds for the iteration, and by what the time-outs are multiplied to fit.
    """
    others = drain + abort + exit_
    scale = min(1.0, seconds * _AUTO_SHARE / others) if others else 1.0
    return max(0.0, seconds - others * scale), scale


def _job(environ: Mapping[str, str]) -> str | None:
    """The job's name from the innermost launcher; a name that torchrun has generated only if there is no other.

    torchrun's run id is "none" without `--rdzv-id`. With `--standalone` it is a random UUID, which no user could pass
    to `drain --job` (torch/distributed/run.py).
    """
    names = [name[: variables.JOB_LENGTH] for name in map(environ.get, _JOB_IDS) if name and name != "none"]
    chosen = [
        name for name in names if not (len(name) == 36 and [*map(len, name.split("-"))] == [8, 4, 4, 4, 12])
    ]
    return next(iter(chosen or names), None)


def known(variable: str) -> bool:
    """Whether an environment variable is a setting or a switch of the agent."""
    return variable in (SWITCH, "AUTOTEARDOWN_SKIP") or variable[len(_PREFIX) :] in variables.TABLE


def signal_name(number: int) -> str:
    """The name of a signal, as SIGTERM for 15; the number as text if the signal has no name."""
    return next((name for name, value in variables.signals().items() if value == number), str(number))


def _scale(found: Settings) -> None:
    """Make the time-outs fit into the grace period."""
    found.wanted = {name: getattr(found, f"{name.lower()}_timeout") for name in _TIMEOUTS}
    found.step_auto = found.step_timeout < 0
    fitted, found.scaled = _fit(found.wanted, found.hard)
    for name, seconds in fitted.items():
        setattr(found, f"{name.lower()}_timeout", seconds)
        _record(found, f"{name}_TIMEOUT", seconds)


def _fit(wanted: Mapping[str, float], hard: float) -> tuple[dict[str, float], float]:
    """Scale time-outs by one factor so that they fit into `hard` seconds; each counts for at most the whole time."""
    most = {name: min(seconds, hard) for name, seconds in wanted.items()}
    if wanted["STEP"] < 0:
        step, scale = automatic_step(hard, most["DRAIN"], most["ABORT"], most["EXIT"])
        return {name: step if name == "STEP" else most[name] * scale for name in wanted}, scale
    total = sum(most.values())
    scale = min(1.0, hard / total) if total else 1.0
    return {name: seconds * scale for name, seconds in most.items()}, scale


def _record(found: Settings, name: str, effective: object) -> None:
    found.sources[_PREFIX + name] = (found.sources[_PREFIX + name][0], effective)


VARIABLES = tuple((_PREFIX + name, row[0], row[3]) for name, row in variables.TABLE.items())
"""Name, default and meaning of every setting, for the docs and for doctor."""

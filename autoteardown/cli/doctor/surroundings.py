"""Reports what the platform will do on an eviction: PID 1, launcher, scheduler, exit codes, and other agents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from autoteardown import settings
from autoteardown.cli.doctor import clouds, init_systems, slurm
from autoteardown.cli.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding

# Other code that starts with the interpreter: its name, the variable or part of PYTHONPATH that shows it, what to know.
_AGENTS = (
    ("ddtrace", "ddtrace/bootstrap", "its sitecustomize imports the next one"),
    ("New Relic", "newrelic/bootstrap", "its sitecustomize imports the next one"),
    (
        "OpenTelemetry",
        "opentelemetry/instrumentation/auto_instrumentation",
        "its sitecustomize imports no other one",
    ),
    (
        "coverage",
        "COVERAGE_PROCESS_START",
        "saves its data at exit, for which there is AUTOTEARDOWN_EXIT_TIMEOUT",
    ),
    (
        "coverage",
        "COVERAGE_PROCESS_CONFIG",
        "saves its data at exit, for which there is AUTOTEARDOWN_EXIT_TIMEOUT",
    ),
    ("autowrapt", "AUTOWRAPT_BOOTSTRAP", "starts from a .pth file, as autoteardown does"),
)
# What each launcher does with the exit code of a signalled rank: the setting that fits, and why.
_EXIT_CODES = {
    "torchrun": ("0", "it returns 1 after a SIGTERM unless AUTOTEARDOWN_EXIT_CODE is set"),
    "Ray": ("0", "an evicted actor has failed whatever the code, and max_restarts counts"),
    "SLURM": (
        "signal",
        "a job that ends with 0 counts as completed; the batch script or RequeueExit=143 requeues it after 143",
    ),
    "Kubernetes": ("signal", "a container that ends with 0 has succeeded, and its Job is complete"),
}


def check(environ: Mapping[str, str], found: settings.Settings, root: Path = Path("/")) -> list[Finding]:
    """Return the findings of all these checks."""
    proc = root / "proc"
    return [
        *_pid_1(found, proc, in_container(environ, root)),
        *_inherited(found, proc),
        *_kubernetes(environ, found),
        *_ray(environ),
        *slurm.check(environ, found),
        *clouds.check(root),
        *_exit_code(environ, found, proc),
        *_agents(environ),
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _words(proc: Path, pid: str) -> list[str]:
    return _read(proc / pid / "cmdline").split("\0")[:-1]


def _children(proc: Path) -> list[list[str]]:
    """The command lines of what PID 1 has started."""
    return [_words(proc, pid) for pid in _read(proc / "1" / "task" / "1" / "children").split()]


def _environ(proc: Path) -> dict[str, str]:
    """The environment of PID 1; empty where that cannot be read."""
    pairs = (word.partition("=") for word in _read(proc / "1" / "environ").split("\0") if word)
    return {name: value for name, _, value in pairs}


def _mask(proc: Path, pid: str, field: str) -> int | None:
    """A signal set of /proc/<pid>/status; bit 0 is signal 1."""
    for line in _read(proc / pid / "status").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1], 16)
    return None


def in_container(environ: Mapping[str, str], root: Path) -> bool:
    """Whether this is a container, whose PID 1 the platform signals, and not a whole machine with its init."""
    marks = (root / ".dockerenv", root / "run" / ".containerenv")
    return any(name in environ for name in ("KUBERNETES_SERVICE_HOST", "container")) or any(
        mark.exists() for mark in marks
    )


def _pid_1(found: settings.Settings, proc: Path, container: bool) -> list[Finding]:
    if not container:
        return [Finding("PID 1", NOTE, "no container recognised here: not checked")]
    if slurm.in_step(proc):
        return [
            Finding("PID 1", NOTE, "SLURM's step daemon signals the tasks itself: PID 1 has no part in it")
        ]
    words = _words(proc, "1")
    if not words:
        return [Finding("PID 1", NOTE, "cannot be read: whether it passes signals on is unknown")]
    if _read(proc / "self" / "stat").partition(" ")[0] == "1":
        return [Finding("PID 1", OK, "this process itself")]
    known = init_systems.shell(words) or init_systems.find(
        words, _read(proc / "1" / "comm").strip(), _children(proc), found.grace
    )
    if known is not None:
        return [known]
    shown = " ".join(words)[:80]
    # An init that is not in the table blocks the signals that it waits for; other programs have handlers.
    masks = [_mask(proc, "1", field) for field in ("SigCgt", "SigBlk")]
    unhandled = [
        each for each in found.signals if not any(mask is None or mask >> (each - 1) & 1 for mask in masks)
    ]
    launcher = init_systems.launcher(words, _environ(proc)) if unhandled else None
    if launcher is not None:
        return [launcher]
    if unhandled:
        names = ", ".join(map(settings.signal_name, unhandled))
        text = f"{shown}: no handler for {names}, and the kernel drops what PID 1 does not handle"
        return [Finding("PID 1", WARNING, text, "start the container with an init (docker run --init, tini)")]
    return [Finding("PID 1", OK, shown)]


def _inherited(found: settings.Settings, proc: Path) -> list[Finding]:
    """Eviction signals that this process ignores or blocks since its start; its ranks would inherit that."""
    findings = []
    for field, state in (("SigIgn", "ignored"), ("SigBlk", "blocked")):
        mask = _mask(proc, "self", field) or 0
        names = [settings.signal_name(each) for each in found.signals if mask >> (each - 1) & 1]
        if names:
            text = f"{', '.join(names)} {state} here, and in every process that is started from here"
            findings.append(
                Finding("signals", PROBLEM, text, "start the job from a parent that does not do that")
            )
    return findings


def _kubernetes(environ: Mapping[str, str], found: settings.Settings) -> list[Finding]:
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return []
    findings = []
    log = found.termination_log
    if log is not None and not Path(log).exists():
        text = f"no {log}: a teardown is not shown in the pod's status"
        findings.append(
            Finding("Kubernetes", NOTE, text, "AUTOTEARDOWN_TERMINATION_LOG = terminationMessagePath")
        )
    elif log is not None and not os.access(log, os.W_OK):
        text = f"{log} cannot be written by uid {os.geteuid()}"
        findings.append(Finding("Kubernetes", WARNING, text, "run as the container's own user"))
    # The downward API has no field for it, so manifests pass the number on under this name.
    period = environ.get("TERMINATION_GRACE_PERIOD_SECONDS", "")
    if period.isdecimal() and found.grace > int(period):
        text = (
            f"AUTOTEARDOWN_GRACE={found.grace:g} is more than the pod's {period} s: the kubelet kills first"
        )
        advice = f"export AUTOTEARDOWN_GRACE={max(2, int(period) - 5)}, less what a preStop hook takes"
        findings.append(Finding("Kubernetes", PROBLEM, text, advice))
    elif period.isdecimal():
        findings.append(
            Finding(
                "Kubernetes",
                OK,
                f"the pod's grace period is {period} s, and AUTOTEARDOWN_GRACE is {found.grace:g}: it fits",
            )
        )
    elif not (found.sources["AUTOTEARDOWN_GRACE"][0] or "").strip():
        text = "AUTOTEARDOWN_GRACE is not set: 25 fits the default terminationGracePeriodSeconds of 30"
        findings.append(
            Finding("Kubernetes", NOTE, text, "set it when the pod has another period or a preStop hook")
        )
    return findings


def _ray(environ: Mapping[str, str]) -> list[Finding]:
    if not _is_ray(environ):
        return []
    text = "actors get no SIGTERM from the pod: `ray start` drains this node's ranks first if the agent is on in it"
    return [
        Finding(
            "Ray",
            NOTE,
            text,
            "AUTOTEARDOWN=1 in the container's environment, or a preStop `autoteardown drain`",
        )
    ]


def _is_ray(environ: Mapping[str, str]) -> bool:
    return any(
        name in environ for name in ("RAY_CLUSTER_NAME", "RAY_ADDRESS", "RAY_JOB_ID", "RAY_NODE_TYPE_NAME")
    )


def _launcher(environ: Mapping[str, str], proc: Path) -> str | None:
    """The innermost launcher, which sees the exit code of a rank; None if none is recognised."""
    command = [Path(word).name for word in _words(proc, "1")]
    if "TORCHELASTIC_RUN_ID" in environ or "torchrun" in command or "torch.distributed.run" in command:
        return "torchrun"
    if _is_ray(environ):
        return "Ray"
    if "SLURM_JOB_ID" in environ:
        return "SLURM"
    return "Kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else None


def _exit_code(environ: Mapping[str, str], found: settings.Settings, proc: Path) -> list[Finding]:
    launcher = _launcher(environ, proc)
    code = "signal" if found.exit_code is None else str(found.exit_code)
    if launcher is None:
        text = f"a signalled rank exits with {code}, its peers with {found.peer_exit_code}; no launcher recognised here"
        return [Finding("exit code", NOTE, text)]
    fits, why = _EXIT_CODES[launcher]
    if fits == "signal" and found.exit_code == 0:
        text = f"a signalled rank exits with 0 under {launcher}: {why}"
        return [
            Finding(
                "exit code",
                WARNING,
                text,
                "export AUTOTEARDOWN_EXIT_CODE=signal, unless that is what you want",
            )
        ]
    findings = [Finding("exit code", OK, f"{code} under {launcher}: {why}")]
    set_ = (found.sources["AUTOTEARDOWN_EXIT_CODE"][0] or "").strip()
    if launcher == "torchrun" and "KUBERNETES_SERVICE_HOST" in environ and not set_:
        text = "the pod fails with torchrun's 1: Kubeflow's restartPolicy ExitCode takes that for permanent"
        findings.append(Finding("exit code", NOTE, text, "restartPolicy OnFailure, or a podFailurePolicy"))
    return findings


def _agents(environ: Mapping[str, str]) -> list[Finding]:
    python_path = environ.get("PYTHONPATH", "")
    return [
        Finding("agents", NOTE, f"{name} starts with this interpreter too: {know}")
        for name, tell, know in _AGENTS
        if ((tell in python_path) if "/" in tell else environ.get(tell))
    ]

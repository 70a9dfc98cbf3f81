"""Imports go downwards through the rooms, and no files import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import autoteardown

PACKAGE = Path(autoteardown.__file__).parent
TOP, CLI, DRILLS = "the top", "cli", "drills"

# The rooms that a room may import besides itself: at run time, inside functions and for types alike.
MAY_IMPORT: dict[str, set[str]] = {
    TOP: set(),
    "event_loop": {TOP},
    "signals": {TOP, "event_loop"},
    "node": {TOP},
    "children": {TOP, "signals", "node"},
    "checkpoints": {TOP, "node"},
    "training": {TOP, "node", "checkpoints"},
    "process_groups": {TOP, "node"},
    "channel": {TOP, "node", "event_loop"},
    "frameworks": {TOP},
    "stop": {TOP, "node"},
    "rank": {
        TOP,
        "event_loop",
        "signals",
        "node",
        "children",
        "checkpoints",
        "training",
        "process_groups",
        "channel",
        "frameworks",
        "stop",
        "launchers",
    },
    "launchers": {TOP, "node", "stop"},
    "cloud_notice": {TOP, "node"},
    "timeline": {TOP},
    DRILLS: {TOP, "node", "timeline"},
    CLI: {TOP, "node", "cloud_notice", "timeline", DRILLS},
}

# The only imports that go upwards. Each is inside a function, so a process pays for it only when it needs it.
UPWARDS = {
    (
        "startup",
        "rank.guard",
    ): "the atexit callback is registered at start-up, and ends a rank if there is one",
    (
        "startup",
        "children.child_signals",
    ): "the same callback: a child's signals stay its own in its last moments",
    ("import_hooks", "signals.interception"): "runs when the program imports `signal`",
    ("import_hooks", "rank.torch_hooks"): "runs when the program imports `torch`",
    ("import_hooks", "children.child_signals"): "runs in processes that `multiprocessing` has spawned",
    ("import_hooks", "launchers.ray_start"): "runs when the program imports `signal`, in a `ray` command",
    ("api", "rank.guard"): "`status()` and `disarm()` ask the armed rank, if there is one",
    ("api", "rank.torch_hooks"): "`arm()` and `disarm()` set whether a later init is guarded",
    ("api", "process_groups.custom_groups"): "`arm()` guards a group that exists already",
    ("api", "training.gate"): "`stop_requested()` and `protect()` run on the program's own threads",
    ("api", "checkpoints.callbacks"): "`on_teardown()` registers a callback",
}


def files() -> dict[str, Path]:
    """The package's files by module name without the package's own."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "_inject":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def room(module: str) -> str:
    """The folder of a module, or the top."""
    if module == "__main__":
        return CLI
    head, dot, _ = module.partition(".")
    return head if dot or (FILES[module].name == "__init__.py" and module) else TOP


def imports(module: str, path: Path) -> dict[str, bool]:
    """The modules of this package that a file imports, and whether it does so only inside functions."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not any(name.partition("autoteardown.")[2] in FILES for name in names):
                names = [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value.startswith("autoteardown.") else []  # importlib, import hooks
        for name in names:
            inner = name.partition("autoteardown.")[2]
            if name.startswith("autoteardown.") and inner in FILES and inner != module:
                found[inner] = found.get(inner, True) and id(node) in inside
    return found


def upside_down(imported: dict[str, dict[str, bool]]) -> set[tuple[str, str]]:
    """The imports that neither table allows."""
    wrong = set()
    for module, others in imported.items():
        for other, lazy in others.items():
            here, there = room(module), room(other)
            listed = lazy and (module, other) in UPWARDS
            if there not in MAY_IMPORT[here] | {here} and not listed:
                wrong.add((module, other))
    return wrong


def circle(imported: dict[str, dict[str, bool]]) -> list[str]:
    """A circle of files that import each other, imports inside functions included; empty when there is none."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(module: str) -> list[str]:
        state[module] = 1
        trail.append(module)
        for other in imported.get(module, {}):
            if state.get(other) == 1:
                return [*trail[trail.index(other) :], other]
            if other not in state:
                found = visit(other)
                if found:
                    return found
        trail.pop()
        state[module] = 2
        return []

    for module in imported:
        if module not in state:
            found = visit(module)
            if found:
                return found
    return []


IMPORTED = {module: imports(module, path) for module, path in FILES.items()}


def test_every_room_is_in_the_table() -> None:
    assert {room(module) for module in FILES if module} == set(MAY_IMPORT)


def test_imports_go_downwards() -> None:
    assert upside_down(IMPORTED) == set()


def test_no_circle_of_files() -> None:
    assert circle(IMPORTED) == []


def test_every_import_upwards_in_the_list_exists() -> None:
    assert {pair for pair in UPWARDS if pair[1] not in IMPORTED[pair[0]]} == set()


def test_the_rooms_themselves_form_no_circle() -> None:
    assert circle({here: dict.fromkeys(may, False) for here, may in MAY_IMPORT.items()}) == []


@pytest.mark.parametrize(
    ("module", "other"),
    [("node.entry", "stop.report"), ("settings", "node.registry"), ("stop.posix_timer", "cli")],
)
def test_the_rule_sees_an_import_that_is_upside_down(module: str, other: str) -> None:
    assert (module, other) in upside_down({module: {other: True}})


@pytest.mark.parametrize("lazy", [False, True])
def test_the_rule_sees_a_circle(lazy: bool) -> None:
    around = {"a": {"b": False}, "b": {"c": False}, "c": {"a": lazy}}
    assert circle(around) == ["a", "b", "c", "a"]
    assert circle({**around, "c": {}}) == []

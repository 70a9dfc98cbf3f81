"""Imports go downwards through the rooms, and no files import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import autoteardown

PACKAGE = Path(autoteardown.__file__).parent
TOP, CLI, DRILLS = "the top", "cli", "drills"

# A room may import itself and what is named here, at run time, inside functions and for types alike.
MAY_IMPORT = {
    TOP: set(),
    "node": {TOP},
    "channel": {TOP, "node"},
    "frameworks": {TOP, "node"},
    "stop": {TOP, "node", "channel"},
    "rank": {TOP, "node", "channel", "frameworks", "stop"},
    "timeline": {TOP},
    DRILLS: {TOP, "node", "timeline"},
    CLI: {TOP, "node", "timeline", DRILLS},
}

# What runs in every process reaches into a room when something happens there, inside a function, so that a process
# that is no rank never pays for it: a file, and the rooms that it may reach so.
DOORS = {
    "finder": {"rank", "node", "frameworks"},
    "startup": {"rank"},
    "api": {"rank"},
    "signals": {"rank", "channel"},
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
    """The imports that the table does not allow."""
    wrong = set()
    for module, others in imported.items():
        for other, lazy in others.items():
            here, there = room(module), room(other)
            door = lazy and there in DOORS.get(module, set())
            if there not in MAY_IMPORT[here] | {here} and not door:
                wrong.add((module, other))
    return wrong


def circle(imported: dict[str, dict[str, bool]]) -> list[str]:
    """A circle of files that import each other when they are loaded; empty when there is none."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(module: str) -> list[str]:
        state[module] = 1
        trail.append(module)
        for other, lazy in imported.get(module, {}).items():
            if lazy:
                continue
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


@pytest.mark.parametrize(
    ("module", "other"),
    [("node.entry", "stop.report"), ("settings", "node.registry"), ("stop.posix_timer", "cli")],
)
def test_the_rule_sees_an_import_that_is_upside_down(module: str, other: str) -> None:
    assert (module, other) in upside_down({module: {other: True}})


def test_the_rule_sees_a_circle() -> None:
    around = {"a": {"b": False}, "b": {"c": False}, "c": {"a": False}}
    assert circle(around) == ["a", "b", "c", "a"]
    assert circle({**around, "c": {"a": True}}) == []

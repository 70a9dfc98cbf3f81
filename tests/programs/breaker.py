"""Breaks one function of the agent from outside, or has each one write down that it was called.

A statement is put at the front of functions of the package, by their source: methods, closures and properties too, and
whatever is added to the package later. `swap` does it in a process that runs already; `rewrite` in a copy of a file.

BREAK=module:qualified.name   that function raises (BREAK_WITH: which error, RuntimeError unless told)
CALLED=path                   every function appends its name to that file
"""

import ast
import gc
import importlib
import os
from pathlib import Path
from types import CodeType, FunctionType

# The functions that the host itself calls have nobody above them to catch what they raise: these guard what they do
# with a `try`, and break within it.
WITHIN = {
    "boundary:guarded.safe",
    "finder:_Finder.find_spec",
    "finder:_serve",
    "loop:Loop._run",
    "loop:_safely",
    "signals:Tap._on_main_thread",
    "standins:put.getsignal",
    "standins:put.set_wakeup_fd",
    "standins:put.signal",
    "startup:_at_exit",
    "switch:say",
    "startup:start",
    "driver:Teardown._finish",
    "stepping:_after_step",
}
# And these do nothing of their own that could fail: they call the host's code, and ours through such a guard.
NEVER = {
    "__init__:__getattr__",
    "api:arm",
    "api:on_teardown",
    "api:status",
    "boundary:failed",
    "boundary:guarded",
    "finder:_Loader.__getattr__",
    "finder:_Loader.__init__",
    "finder:_Loader.create_module",
    "finder:_Loader.exec_module",
    "instrument:_wrap_destroy.destroy_process_group",
    "instrument:_wrap_init.init_process_group",
    "instrument:_wrap_save.save",
    "instrument:_wrap_worker_handlers._set_worker_signal_handlers",
    "forks:Forks._unmask",
    "signals:_failed",
    "driver:end",
}


ROOMS = ("rank", "stop", "channel", "node", "frameworks")


def files(package):
    """What of the package runs in the host's processes: a name without its folder says which file is meant."""
    return [*package.glob("*.py"), *(path for room in ROOMS for path in (package / room).glob("[!_]*.py"))]


def functions(path):
    """The name and the node of every function in a file, nested ones included."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            yield from walk(child, f"{prefix}{child.name}." if named else prefix)

    return walk(ast.parse(path.read_text()), "")


def statement(name, environ):
    """What goes to the front of the function of that name; None: nothing."""
    if "CALLED" in environ:
        return f"__import__('_io').open({environ['CALLED']!r}, 'a').write({name + chr(10)!r})"
    if environ.get("BREAK") == name and name not in NEVER:
        return f"raise {environ.get('BREAK_WITH', 'RuntimeError')}('broken: {name}')"
    return None


def rewrite(path, environ=os.environ):
    """The code of a file with the statements in."""
    tree = ast.parse(path.read_text())
    lines = {node.lineno: name for name, node in functions(path)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{path.stem}:{lines[node.lineno]}"
            text = statement(name, environ)
            if text is not None:
                body = node.body
                if name in WITHIN:
                    body = next(each.body for each in body if isinstance(each, ast.Try))
                at = 1 if body is node.body and ast.get_docstring(node, clean=False) is not None else 0
                extra = ast.parse(text).body[0]
                for each in ast.walk(extra):
                    ast.copy_location(each, body[0])
                body.insert(at, extra)
    return ast.fix_missing_locations(tree)


def _codes(code):
    """Every code object in one, by what tells it from the others."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield (each.co_name, each.co_firstlineno), each
            yield from _codes(each)


def swap():
    """Break what is to be broken, in this process."""
    if not {"BREAK", "CALLED"} & set(os.environ):
        return
    package = Path(importlib.util.find_spec("autoteardown").origin).parent
    swapped = {}
    for path in files(package):
        if "CALLED" in os.environ or os.environ["BREAK"].partition(":")[0] == path.stem:
            module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
            importlib.import_module(module.replace(".__init__", ""))
            swapped[str(path)] = dict(_codes(compile(rewrite(path), str(path), "exec")))
    gc.unfreeze()
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename in swapped:
            each.__code__ = swapped[each.__code__.co_filename][
                each.__code__.co_name, each.__code__.co_firstlineno
            ]
    gc.freeze()

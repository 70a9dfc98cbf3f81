"""Breaks one function of the agent from outside, or has each one record that it was called.

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
    "fail_open:fail_open.safe",
    "import_hooks:_Finder.find_spec",
    "import_hooks:_serve",
    "event_loop.loop:Loop._run",
    "event_loop.loop:_safely",
    "signals.interception:SignalInterceptor._on_main_thread",
    "signals.replacements:put.getsignal",
    "signals.replacements:put.set_wakeup_fd",
    "signals.replacements:put.signal",
    "startup:_at_exit",
    "switch:say",
    "startup:start",
    "stop.driver:Teardown._finish",
    "training.optimizer_hooks:_after_step",
}
# And these do nothing of their own that could fail: they call the host's code, and ours through such a guard.
NEVER = {
    "__init__:__getattr__",
    "api:arm",
    "api:on_teardown",
    "api:status",
    "fail_open:report_failure",
    "fail_open:fail_open",
    "import_hooks:_Loader.__getattr__",
    "import_hooks:_Loader.__init__",
    "import_hooks:_Loader.create_module",
    "import_hooks:_Loader.exec_module",
    "rank.torch_hooks:_wrap_destroy.destroy_process_group",
    "rank.torch_hooks:_wrap_init.init_process_group",
    "rank.torch_hooks:_wrap_save.save",
    "rank.torch_hooks:_wrap_shrink.shrink_group",
    "rank.torch_hooks:_wrap_worker_handlers._set_worker_signal_handlers",
    "signals.fork:ForkHooks._unmask",
    "spare_threads:_Spare._run",
    "signals.interception:_failed",
    "stop.driver:end",
}


COMMANDS = {"cli", "drills", "timeline", "launchers"}


def files(package):
    """The files of the package that run in the host's processes."""
    rooms = (folder for folder in sorted(package.iterdir()) if folder.name not in COMMANDS)
    return [*package.glob("*.py"), *(path for room in rooms for path in sorted(room.glob("[!_]*.py")))]


def module_of(path):
    """The module in a file, without the package's name: "rank.guard"."""
    parts = path.with_suffix("").parts
    return ".".join(parts[len(parts) - parts[::-1].index("autoteardown") :])


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
            name = f"{module_of(path)}:{lines[node.lineno]}"
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
        if "CALLED" in os.environ or os.environ["BREAK"].partition(":")[0] == module_of(path):
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

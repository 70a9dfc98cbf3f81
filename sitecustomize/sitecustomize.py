"""Starts autoteardown where it cannot be installed: this folder on PYTHONPATH is all it takes.

It hides any other `sitecustomize` further down the path, so it imports that one in the end, as if it were not here.
Any interpreter of the image may run this file: it has to be valid syntax for old Pythons too.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _hide():
    """Take this folder from the path; what `_show` needs to put it back."""
    hidden = [(at, entry) for at, entry in enumerate(sys.path) if entry and os.path.abspath(entry) == _HERE]
    for _, entry in hidden:
        sys.path.remove(entry)
    return hidden


def _show(hidden):
    for at, entry in hidden:
        sys.path.insert(at, entry)


def _start():
    if not os.environ.get("AUTOTEARDOWN"):
        return
    if sys.version_info < (3, 9):
        os.write(2, b"autoteardown: Python older than 3.9 is not supported: off\n")
        return
    # Either <root>/autoteardown/_inject/ as installed, or <root>/sitecustomize/ of a source tree.
    root = os.path.dirname(_HERE)
    if os.path.basename(root) == "autoteardown" and os.path.isfile(os.path.join(root, "startup.py")):
        root = os.path.dirname(root)
    # Last, so that whatever the image has itself wins over what came with us (wrapt).
    if root not in sys.path:
        sys.path.append(root)
    hidden = _hide()  # `autoteardown.py` beside this file is for when this one does not run
    try:
        from autoteardown.startup import start
    finally:
        _show(hidden)

    start("sitecustomize")


def _start_quietly():
    try:
        _start()
    except BaseException:
        try:
            os.write(2, ("autoteardown: start-up failed: %r\n" % (sys.exc_info()[1],)).encode())
        except OSError:
            pass


def _import_the_next():
    this = sys.modules.pop("sitecustomize", None)
    hidden = _hide()
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise  # its own failure: `site` reports it, as it would without us
    finally:
        _show(hidden)
        # importlib wants to find something under this name when it is done with us.
        if this is not None:
            sys.modules.setdefault("sitecustomize", this)


_start_quietly()
_import_the_next()

"""Stands for the package where only this folder is on the path, and gives way to it at once.

So `python -m autoteardown doctor` works in an injected container also with the switch off, or behind a `sitecustomize`
that imports no other one: it is for finding out just that. An installed autoteardown comes before the one beside us.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _give_way():
    # Either <root>/autoteardown/_inject/ as installed, or <root>/sitecustomize/ of a source tree.
    root = os.path.dirname(_HERE)
    if os.path.basename(root) == "autoteardown" and os.path.isfile(os.path.join(root, "startup.py")):
        root = os.path.dirname(root)
    if root not in sys.path:
        sys.path.append(root)  # last, as `sitecustomize.py` does it
    hidden = [(at, entry) for at, entry in enumerate(sys.path) if entry and os.path.abspath(entry) == _HERE]
    for _, entry in hidden:
        sys.path.remove(entry)
    sys.modules.pop("autoteardown", None)
    try:
        import autoteardown
    finally:
        for at, entry in hidden:
            sys.path.insert(at, entry)
    return autoteardown


_give_way()
if __name__ == "__main__":
    from autoteardown.cli import main

    sys.exit(main())

"""Reports a failed write to the application's wake-up fd as CPython would."""

from __future__ import annotations

import sys
import types

from autoteardown.signals import dispositions

_MESSAGE = "Exception ignored when trying to write to the signal wakeup fd"


def wakeup_write_failed(error: OSError) -> None:
    """Report it on the main thread, through `sys.unraisablehook` if the program has set one."""

    def say() -> None:
        hook = sys.unraisablehook
        if hook is not sys.__unraisablehook__:
            fields = {"exc_type": type(error), "exc_value": error, "exc_traceback": None}
            hook(types.SimpleNamespace(**fields, err_msg=_MESSAGE, object=None))
        elif sys.stderr is not None:
            sys.stderr.write(f"{_MESSAGE}:\n{type(error).__name__}: {error}\n")

    dispositions.call_on_main(say)

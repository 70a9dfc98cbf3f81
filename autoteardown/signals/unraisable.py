"""What CPython says when it cannot write to the wake-up fd of the program, said where we write there for it."""

from __future__ import annotations

import sys
import types

from autoteardown.signals import dispositions

_MESSAGE = "Exception ignored when trying to write to the signal wakeup fd"


def wakeup_write_failed(error: OSError) -> None:
    """Have the main thread say it, as the interpreter would: through `sys.unraisablehook` if that is the program's."""

    def say() -> None:
        hook = sys.unraisablehook
        if hook is not sys.__unraisablehook__:
            fields = {"exc_type": type(error), "exc_value": error, "exc_traceback": None}
            hook(types.SimpleNamespace(**fields, err_msg=_MESSAGE, object=None))
        elif sys.stderr is not None:
            sys.stderr.write(f"{_MESSAGE}:\n{type(error).__name__}: {error}\n")

    dispositions.call_on_main(say)

"""Functions that replace those of the `signal` module and cannot be told from the originals.

1. `signal` and `getsignal` are Python functions in the standard library, and their replacements are, too.
2. `set_wakeup_fd` is a built-in function. Its replacement does not become a method when a class has it as an
   attribute, and `inspect`, `pydoc`, `pickle` and `copy` take it for the original (CPython's own tests check this).
3. Every process that imports `signal` imports this module: see `interception.py`.
"""

import functools

from autoteardown.unpatched import builtin_function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    SignalInterceptor = Any  # interception.SignalInterceptor, which imports this module


class Builtin:
    """A callable that calls `function`, and is in all else the built-in function `original`."""

    __slots__ = ("_function", "_original")

    def __init__(self, original: "Any", function: "Callable[..., object]") -> None:
        self._original = original
        self._function = function

    @property  # type: ignore[misc]  # what isinstance() and `inspect` look at
    def __class__(self) -> "Any":
        return builtin_function

    def __call__(self, *args: "Any", **kwargs: "Any") -> object:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._original, name)

    @property
    def __doc__(self) -> "Any":  # type: ignore[override]
        return self._original.__doc__

    @property
    def __module__(self) -> "Any":  # type: ignore[override]
        return self._original.__module__

    def __dir__(self) -> "Any":
        return dir(self._original)

    def __repr__(self) -> str:
        return repr(self._original)

    def __reduce__(self) -> str:
        return str(self._original.__reduce__())  # pickled by name

    def __reduce_ex__(self, protocol: "Any") -> str:
        return self.__reduce__()


def put(interceptor: "SignalInterceptor", module: "Any") -> None:
    """Replace the functions in the `signal` module."""
    real_signal, real_getsignal, real_set_wakeup_fd = interceptor.originals

    @functools.wraps(real_signal)
    def signal(signalnum: "Any", handler: "Any") -> "Any":
        try:
            return interceptor.set_handler(signalnum, handler)
        except Exception as error:
            problem = error
        # If the error is not the agent's, the original raises it again, without the agent in the traceback.
        old = interceptor.seen(signalnum, real_signal(signalnum, handler))
        interceptor.report_failure("signal.signal", problem)
        return old

    @functools.wraps(real_getsignal)
    def getsignal(signalnum: "Any") -> "Any":
        try:
            return interceptor.handler_of(signalnum)
        except Exception as error:
            problem = error
        handler = interceptor.seen(signalnum, real_getsignal(signalnum))
        interceptor.report_failure("signal.getsignal", problem)
        return handler

    def set_wakeup_fd(*args: "Any", **kwargs: "Any") -> int:
        old: int = real_set_wakeup_fd(*args, **kwargs)
        try:
            old = interceptor.wakeup_fd_set(old, args[0], bool(kwargs.get("warn_on_full_buffer", True)))
        except Exception as error:
            interceptor.report_failure("signal.set_wakeup_fd", error)
        return old

    for function, real in ((signal, real_signal), (getsignal, real_getsignal)):
        if hasattr(real, "__wrapped__"):
            function.__wrapped__ = real.__wrapped__
    module.signal = signal
    module.getsignal = getsignal
    module.set_wakeup_fd = _like(real_set_wakeup_fd, set_wakeup_fd)
    home = getattr(real_set_wakeup_fd, "__self__", None)
    if home is not None:
        home.set_wakeup_fd = module.set_wakeup_fd  # `pickle` looks for it in `_signal`


def _like(real: "Any", function: "Callable[..., object]") -> "Any":
    if isinstance(real, builtin_function):
        return Builtin(real, function)
    return functools.wraps(real)(function)  # gevent has replaced the built-in function with one of its own


def interrupt_main(interceptor: "SignalInterceptor", real: "Any") -> "Any":
    """Make a replacement of `_thread.interrupt_main` for an armed process.

    While the process is armed, the Python-level handler of an eviction signal is the trampoline even where the
    application has the default action; for that, `interrupt_main` is documented to do nothing.
    """

    def interrupt_main(*args: "Any", **kwargs: "Any") -> object:
        signum = args[0] if args else kwargs.get("signum")
        if (
            isinstance(signum, int)
            and signum in interceptor.signals
            and not callable(interceptor.handler_of(signum))
        ):
            return None  # documented to do nothing under the default action
        return real(*args, **kwargs)

    return Builtin(real, interrupt_main)

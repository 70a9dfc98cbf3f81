"""Stand-ins for functions of the `signal` module, which cannot be told from the originals.

`signal` and `getsignal` are Python functions there, and stay such. `set_wakeup_fd` is built in, and what stands for it
is neither a method when it is found in a class, nor a function of ours to pydoc, pickle and copy.
"""

import functools

from autoteardown.unpatched import builtin_function

TYPE_CHECKING = False  # imported by every process that imports `signal`: see signals/interception.py
if TYPE_CHECKING:
    from typing import Any, Callable

    SignalInterceptor = Any  # signals.Tap, which imports this


class Builtin:
    """Calls `function`, and in all else is the built-in function that it stands for."""

    __slots__ = ("_function", "_original")

    def __init__(self, original: "Any", function: "Callable[..., object]") -> None:
        self._original = original
        self._function = function

    @property  # type: ignore[misc]  # what isinstance() looks at, and with it `inspect`
    def __class__(self) -> "Any":
        return builtin_function

    def __call__(self, *args: "Any", **kwargs: "Any") -> object:
        """As the original, and what we need."""
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
        return str(self._original.__reduce__())  # by name

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
        # If it was not us, the original raises it again: as itself, and without a traceback of ours.
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
        home.set_wakeup_fd = module.set_wakeup_fd  # in `_signal`, where pickle looks for it


def _like(real: "Any", function: "Callable[..., object]") -> "Any":
    if isinstance(real, builtin_function):
        return Builtin(real, function)
    return functools.wraps(real)(function)  # gevent's


def interrupt_main(interceptor: "SignalInterceptor", real: "Any") -> "Any":
    """For `_thread.interrupt_main` while a rank is armed, when an eviction signal's real handler is not the default."""

    def interrupt_main(*args: "Any", **kwargs: "Any") -> object:
        signum = args[0] if args else kwargs.get("signum")
        if (
            isinstance(signum, int)
            and signum in interceptor.signals
            and not callable(interceptor.handler_of(signum))
        ):
            return None  # documented: nothing happens
        return real(*args, **kwargs)

    return Builtin(real, interrupt_main)

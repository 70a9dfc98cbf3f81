"""Hooks on torch's optimizers: feed the iteration counter with steps, and with whether a forward pass came before each.

A step inside backward (one optimizer for each parameter, `register_post_accumulate_grad_hook`) may run on autograd's
own thread, in any order, hundreds of times in an iteration. All steps of one backward pass count as one, which ends
where that pass returns to the program, on the program's own thread.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable, Optional

from autoteardown.fail_open import report_failure
from autoteardown.training import gate
from autoteardown.unpatched import get_ident, monotonic

_BACKWARD = "backward"
_LOOKS = 0x1FF  # a mask: something is done at every 512th iteration
_FIRST = 2  # the count at which the counter first knows that an iteration is over

_graph_task: Callable[[], int] = lambda: -1  # noqa: E731  torch's own: not -1 on a thread that is in backward
# torch's own: counts the autograd nodes that this thread has created
_sequence: Optional[Callable[[], int]] = None
_before: tuple[int, int] = (0, -1)  # the thread and its count at the last step
_passes = 0  # backward passes in progress
_stepped_in_one = False
_now_and_then: Callable[[], object] = lambda: None  # noqa: E731


class OptimizerHooks:
    """Hooks every optimizer of the process, now and later; `remove` takes the hooks off.

    Args:
        now_and_then: called at the end of every 512th iteration.
    """

    def __init__(self, now_and_then: Callable[[], object]) -> None:
        global _graph_task, _sequence, _now_and_then
        _now_and_then = now_and_then
        core = getattr(sys.modules["torch"], "_C", None)
        _graph_task = getattr(core, "_current_graph_task_id", _graph_task)
        _sequence = getattr(getattr(core, "_autograd", None), "_get_sequence_nr", None)
        optimizer = sys.modules["torch.optim.optimizer"]
        self._handles = [optimizer.register_optimizer_step_post_hook(_after_step)]
        before = getattr(optimizer, "register_optimizer_step_pre_hook", None)
        if before is not None:
            self._handles.append(before(_before_step))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def any_optimizer() -> bool:
    """Whether this process has created an optimizer, and so is going to step even if it has not yet."""
    optimizer = sys.modules.get("torch.optim.optimizer")
    kinds = [optimizer.Optimizer] if optimizer is not None else []
    while kinds:
        kind = kinds.pop()
        if "step" in vars(kind) and getattr(
            kind.step, "hooked", False
        ):  # set by the first instance's __init__
            return True
        kinds += kind.__subclasses__()
    return False


def _before_step(optimizer: object, args: object, kwargs: object) -> None:
    """`torch.optim.optimizer.register_optimizer_step_pre_hook`."""
    if gate.gate.closed:
        gate.gate.before_step()


def _after_step(optimizer: object, args: object, kwargs: object) -> None:
    """`torch.optim.optimizer.register_optimizer_step_post_hook`: global, after every optimizer's step."""
    global _before, _stepped_in_one
    try:
        if _graph_task() != -1:
            if not _stepped_in_one:
                _stepped_in_one = True
                _watch_backward()
            return
        now = (get_ident(), _sequence() if _sequence is not None else _before[1] + 1)
        fresh, _before = now != _before, now
        _step(id(optimizer), fresh)
    except Exception as error:
        if error is gate.gate.delivery.raised:
            raise
        report_failure("step hook", error)


def _step(who: object, fresh: bool) -> None:
    g = gate.gate
    if g.clock.step(who, fresh):
        g.end_of_iteration()
        if g.clock.count & _LOOKS == _FIRST:
            g.look_around()
            _now_and_then()
    elif not g.step_times.ends:
        g.step_times.ends.append(monotonic())  # the first step: the first iteration ends about now


# What `torch.compiler.disable` does, without importing the compiler: a compiled step calls the hooks untraced.
_before_step._torchdynamo_disable = True  # type: ignore[attr-defined]
_after_step._torchdynamo_disable = True  # type: ignore[attr-defined]


def _watch_backward() -> None:
    """Find out when a backward pass ends. Only done where optimizers step inside backward."""
    autograd = sys.modules["torch.autograd"]
    real = autograd.backward
    if hasattr(real, "_autoteardown_wrapped"):
        return

    @functools.wraps(real)
    def backward(*args: Any, **kwargs: Any) -> Any:
        global _passes
        _passes += 1  # activation checkpointing starts a pass inside a pass, on any thread
        try:
            result = real(*args, **kwargs)
        finally:
            _passes -= 1
        if _stepped_in_one and not _passes:
            _backward_over()
        return result

    backward._autoteardown_wrapped = True  # type: ignore[attr-defined]
    backward._torchdynamo_disable = True  # type: ignore[attr-defined]
    autograd.backward = backward  # type: ignore[attr-defined]


def _backward_over() -> None:
    global _stepped_in_one
    _stepped_in_one = False
    try:
        _step(_BACKWARD, True)
    except Exception as error:
        if error is gate.gate.delivery.raised:
            raise
        report_failure("the end of a backward pass", error)

"""The application's own handler keeps its rights, whatever installs it, wherever and whenever."""

import re
import signal
import time

import pytest
from harness import AGENT, HANDWRITTEN, NONE, SHORT, SIGTERM, wait_until

# `auto` leaves the application GRACE - 1 - 6 s: 5 s, so that it is never cut short on a busy machine, or 1 s.
PATIENT = {"AUTOTEARDOWN_GRACE": 12}
IMPATIENT = {"AUTOTEARDOWN_GRACE": 8}


def stays_out(rank):
    """The agent did not touch it: no report, nothing destroyed, no last line of ours."""
    assert not [text for text in rank.log_lines if text.startswith("done")], rank.transcript()
    assert "saved with a group" in rank.stdout, rank.transcript()
    return "left by itself" in rank.stdout


STYLES = [(style, when) for style in ("flag", "exits", "raises", "twice") for when in ("before", "after")]


@pytest.mark.parametrize("style, when", [*STYLES, ("flag", "early")])
def test_the_application_leaves_by_itself(job, style, when):
    """A flag-style handler, before or after init: it runs, the loop saves and leaves with its own code."""
    (rank,) = job.world("handlers.py", 1, style, when, fresh=when == "early", **PATIENT)
    rank.wait_for("^step 2$")
    assert rank.evict(12) == 42, rank.transcript()
    assert stays_out(rank)
    assert rank.stdout.count("handler 15") == 1
    assert "called twice" not in rank.stdout


@pytest.mark.parametrize("style", ["flag", "collective", "chains"])
def test_a_whole_world_leaves_by_itself(job, style):
    """Megatron and Lightning need their peers for another step: the agent tells nobody while the handler has time."""
    ranks = job.world("handlers.py", 2, style, "after", **PATIENT)
    for rank in ranks:
        rank.wait_for("^step 2$")
    for rank in ranks if style == "collective" else ranks[:1]:
        rank.signal()
    for rank in ranks:
        assert rank.outlast(12) == 42, rank.transcript()
        assert stays_out(rank)


@pytest.mark.parametrize("style", ["hangs", "deaf"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_that_does_not_end_the_process(job, style, when):
    """If it hangs, the agent ends the process in time (isaac-sim/IsaacLab#6530: the process lived on)."""
    (rank,) = job.world("handlers.py", 1, style, when, **IMPATIENT)
    rank.wait_for("^step 2$")
    assert rank.evict(8) == 0, rank.transcript()
    assert "handler 15" in rank.stdout
    assert rank.phase("yield")["outcome"] == "timeout"


def test_control_hanging_handler(job):
    """The control of the test above."""
    (rank,) = job.world("handlers.py", 1, "hangs", "before", mode=NONE)
    rank.wait_for("^step 2$")
    assert rank.evict(SHORT) == -signal.SIGKILL


@pytest.mark.parametrize("setting, least, most", [("off", 0.0, 0.5), ("2", 2.0, 4.0), ("auto", 1.0, 2.0)])
def test_yield_setting(job, setting, least, most):
    """AUTOTEARDOWN_YIELD: a number of seconds, `auto`, or `off` to take over at once."""
    (rank,) = job.world("handlers.py", 1, "deaf", "before", AUTOTEARDOWN_YIELD=setting, **IMPATIENT)
    rank.wait_for("^step 2$")
    assert rank.evict(8) == 0, rank.transcript()
    phase = rank.phase("yield")
    assert least <= (phase["end"] if phase else 0.0) < most, phase


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_that_only_exits(job, when):
    """Who owns the signal: a handler of the application's runs; with SystemExit it leaves with its own code."""
    (rank,) = job.world("handlers.py", 1, "exit-only", when, **PATIENT)
    rank.wait_for("^step 2$")
    assert rank.evict(12) == 1, rank.transcript()


@pytest.mark.parametrize("style", ["flag", "deaf", "none"])
def test_init_from_a_worker_thread(job, style):
    """Init from a worker thread, with and without an earlier handler: the job runs, SIGTERM tears down."""
    (rank,) = job.world(
        "handlers.py", 1, style, "before" if style != "none" else "never", "thread", **PATIENT
    )
    rank.wait_for("^step 2$")
    assert rank.evict(12) == (42 if style == "flag" else 0), rank.transcript()
    assert ("handler 15" in rank.stdout) == (style != "none")
    if style != "flag":
        expected = "partial" if style == "deaf" else "clean"  # stopped wherever it was
        assert rank.report()["outcome"] == expected, rank.transcript()


def test_control_init_from_a_worker_thread(job):
    """The hand-written handler cannot be installed there."""
    rank = job.start(
        """
        import threading
        import handwritten
        threading.Thread(target=handwritten.install).start()
        """,
        mode=HANDWRITTEN,
    )
    rank.wait()
    assert "ValueError: signal only works in main thread" in rank.stderr


@pytest.mark.parametrize("main", ["time.sleep(3600)", "thread.join()", "dist.all_reduce(torch.ones(1))"])
def test_training_thread_while_main_is_busy(job, main):
    """The right code in time, with init on another thread, and the main thread anywhere, blocked in C included."""
    rank, _ = job.world(
        f"""
        import threading, time
        import torch, torch.distributed as dist

        def train():
            dist.init_process_group("gloo")
            ready.set()
            while True:
                time.sleep(0.01)

        ready = threading.Event()
        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        ready.wait()
        print("ready", flush=True)
        if dist.get_rank() == 0:
            {main}
        time.sleep(3600)
        """,
        AUTOTEARDOWN_PEERS="off",
    )
    rank.wait_blocked("ready")
    assert rank.evict() == 0, rank.transcript()


def test_stand_ins_are_invisible(job):
    """Same return values, same errors, same thread rules as the originals, in every state of the agent."""
    program = """
        import inspect, os, signal, socket, sys, threading
        import torch.distributed as dist

        def first(signum, frame): print("first", signum, frame is not None, flush=True)
        def second(signum, frame): print("second", flush=True)
        def attempt(function, *args, **kwargs):
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            print(getattr(result, "__name__", result), flush=True)
        def look():
            TERM = signal.SIGTERM
            attempt(signal.getsignal, TERM)
            attempt(signal.signal, TERM, first)
            attempt(signal.getsignal, 15)
            os.kill(os.getpid(), TERM)
            attempt(signal.signal, 15, second)
            attempt(signal.signal, TERM, signal.SIG_IGN)
            os.kill(os.getpid(), TERM)
            attempt(signal.getsignal, TERM)
            attempt(signal.signal, TERM, signal.SIG_DFL)
            attempt(signal.signal, TERM, 17)
            attempt(signal.signal, TERM, None)
            attempt(signal.signal, "TERM", first)
            attempt(signal.signal, 4711, first)
            attempt(signal.getsignal, 4711)
            attempt(signal.signal, TERM)
            attempt(signal.signal, signalnum=TERM, handler=first)
            attempt(signal.getsignal, TERM)
            thread = threading.Thread(target=attempt, args=[signal.signal, TERM, first])
            thread.start(), thread.join()
            thread = threading.Thread(target=attempt, args=[signal.set_wakeup_fd, -1])
            thread.start(), thread.join()
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            attempt(signal.set_wakeup_fd, 4000)
            attempt(signal.set_wakeup_fd, ours.fileno())
            print(signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False) == -1)
            print(signal.set_wakeup_fd(theirs.fileno()) == theirs.fileno())
            signal.signal(signal.SIGUSR1, lambda *args: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGCHLD)
            print(ours.recv(100))
            print(signal.set_wakeup_fd(-1) == theirs.fileno(), signal.set_wakeup_fd(-1))
            attempt(signal.signal, TERM, signal.SIG_DFL)
            print(inspect.signature(signal.signal), signal.signal.__name__, signal.getsignal.__module__)

        look()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if "yield" not in sys.argv:
            look()
        dist.destroy_process_group()
        look()
        print("end", threading.active_count())
    """
    seen = []
    for mode in (AGENT, NONE):
        rank = job.start(program, "yield", mode=mode)
        rank.wait()
        # Which descriptors are free is gloo's business: its threads close theirs some time after a destroy.
        seen.append(re.sub(r"fd \d", "fd N", rank.stdout).splitlines())
        assert rank.stderr == ""
    assert seen[0] == seen[1]
    assert seen[1][-1] == "end 1"


def test_stand_ins_while_armed(job):
    """The same while a group is up, where SIGTERM itself is not sent."""
    program = """
        import signal, threading
        import torch.distributed as dist
        def first(signum, frame): pass
        def second(signum, frame): pass
        def attempt(function, *args):
            try:
                result = function(*args)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            print(getattr(result, "__name__", result), flush=True)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        attempt(signal.getsignal, signal.SIGTERM)
        for handler in (first, second, signal.SIG_DFL, first, signal.SIG_IGN, first, 17, signal.SIG_DFL):
            attempt(signal.signal, signal.SIGTERM, handler)
            attempt(signal.getsignal, signal.SIGTERM)
        thread = threading.Thread(target=attempt, args=[signal.signal, signal.SIGTERM, first])
        thread.start(), thread.join()
        attempt(signal.getsignal, signal.SIGTERM)
        attempt(signal.set_wakeup_fd, -1)
        dist.destroy_process_group()
        attempt(signal.getsignal, signal.SIGTERM)
    """
    seen = []
    for mode in (AGENT, NONE):
        rank = job.start(program, mode=mode)
        assert rank.wait() == 0
        seen.append(rank.stdout.splitlines())
    assert seen[0] == seen[1]


def test_destroy_gives_the_handler_back(job):
    """`destroy_process_group` disarms; the handler in force is then the application's, for real."""
    rank = job.start(
        """
        import signal, sys, time
        import torch.distributed as dist
        def handler(signum, frame):
            print("handler", flush=True)
            sys.exit(7)
        signal.signal(signal.SIGTERM, handler)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.destroy_process_group()
        print("ready", signal.getsignal(signal.SIGTERM) is handler, flush=True)
        while True:
            time.sleep(0.01)
        """
    )
    assert "True" in rank.wait_for("^ready.*$")[0]
    assert rank.evict() == 7, rank.transcript()
    assert rank.log_lines == []


def test_save_and_restore_around_training(job):
    """Frameworks restore what they found, at the end or in between (verl, HF Trainer): still guarded after."""
    rank = job.start(
        """
        import signal, time
        import torch.distributed as dist
        def handler(signum, frame): print("never", flush=True)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        found = signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGTERM, found)
        original = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGTERM, original)
        print("ready", flush=True)
        time.sleep(3600)
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert "never" not in rank.stdout
    assert (
        rank.phase("yield") in (None, {**rank.phase("yield"), "outcome": "skipped"})
        if rank.phase("yield")
        else True
    )


def test_signal_module_swapped_for_a_while(job):
    """verl puts a stub in place of `signal.signal` around an import, and puts back what it found."""
    rank = job.start(
        """
        import signal, time
        import torch.distributed as dist
        original, signal.signal = signal.signal, lambda *args: None
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        signal.signal = original
        print("ready", flush=True)
        time.sleep(3600)
        """
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()


LOOPS = {
    "asyncio": "asyncio.run(main())",
    "asyncio, other signal": "asyncio.run(main(signal.SIGUSR1))",
    "uvloop": "uvloop.run(main())",
    "uvloop, other signal": "uvloop.run(main(signal.SIGUSR1))",
    "trio": "trio.run(nursery)",
    "after asyncio": "asyncio.run(main(signal.SIGUSR1, forever=False)); print('ready', flush=True); time.sleep(3600)",
    "after uvloop": "uvloop.run(main(signal.SIGUSR1, forever=False)); print('ready', flush=True); time.sleep(3600)",
}
LOOP_PROGRAM = """
import asyncio, os, signal, time
try:
    import trio, uvloop
except ImportError:
    pass
import torch.distributed as dist

async def main(signum=None, forever=True):
    got = asyncio.Event()
    if signum:
        asyncio.get_running_loop().add_signal_handler(signum, got.set)
        os.kill(os.getpid(), signum)
        await got.wait()
    print("loop got its own" if signum else "no own", flush=True)
    if forever:
        print("ready", flush=True)
        while True:
            await asyncio.sleep(0.01)

async def nursery():
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        async for signum in signals:
            print("loop got its own", flush=True)
            break
    print("ready", flush=True)
    while True:
        await trio.sleep(0.01)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_event_loops(job, loop):
    """SIGTERM acts under an event loop in the main thread, which keeps its own signals, silently."""
    for name in ("uvloop", "trio"):
        if name in loop:
            pytest.importorskip(name)
    rank = job.start(LOOP_PROGRAM + LOOPS[loop] + "\n")
    rank.wait_for("ready")
    assert ("loop got its own" in rank.stdout) == (loop not in ("asyncio", "uvloop"))
    assert rank.stderr == "", "trio warns of a collision over the wake-up fd"
    assert rank.evict() == 0, rank.transcript()
    assert rank.report()["outcome"] == "clean", rank.transcript()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("blocked", [False, True])
def test_event_loop_that_owns_sigterm(job, loop, blocked):
    """A loop's `add_signal_handler(SIGTERM)` is the application's handler; a loop that is blocked is not waited for."""
    pytest.importorskip(loop)
    (rank,) = job.world(
        f"""
        import asyncio, signal, sys, time
        import {loop}, torch.distributed as dist

        async def asynchronous():
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            train()
            await stop.wait()
            await asyncio.sleep(0.2)
            save()

        async def nursery():
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                train()
                await signals.__anext__()
                await trio.sleep(0.2)
                save()

        def train():
            dist.init_process_group("gloo")
            print("ready", flush=True)
            if {blocked}:
                time.sleep(3600)

        def save():
            print("saved with a group" if dist.is_initialized() else "too late", flush=True)
            sys.exit(42)

        {"trio.run(nursery)" if loop == "trio" else f"{loop}.run(asynchronous())"}
        """,
        1,
        **(IMPATIENT if blocked else PATIENT),
    )
    rank.wait_for("ready")
    assert rank.evict(8 if blocked else 12) == (0 if blocked else 42), rank.transcript()
    assert blocked or stays_out(rank) is False


def test_async_event_loop_off_the_main_thread(job):
    """As in Ray's async actors: loop, init and a blocked collective on a thread, the main thread elsewhere."""
    rank, _ = job.world(
        """
        import asyncio, threading
        import torch, torch.distributed as dist

        async def main():
            # CPython notices no signal that comes as the main thread is about to wait for a lock: by then it waits.
            await asyncio.sleep(0.5)
            dist.init_process_group("gloo")
            print("ready", flush=True)
            if dist.get_rank() == 0:
                dist.all_reduce(torch.ones(1))
            await asyncio.sleep(3600)

        threading.Thread(target=asyncio.run, args=[main()], daemon=True).start()
        threading.Event().wait()
        """,
        AUTOTEARDOWN_PEERS="off",
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()


def test_signal_before_the_handler_is_in(job):
    """vllm#44751: from the very first moment of `init_process_group` on, wherever it is, the rank is guarded."""
    codes = []
    for delay in (0, 0.003, 0.006, 0.012, 0.025, 0.05, 0.1):
        (rank,) = job.world("rendezvous.py", missing=[1])
        rank.wait_for("joining")
        time.sleep(delay)  # another place on the way into init every time
        codes.append(rank.evict())
        # Before init there is no rank yet: it dies as it would without the agent. Never anything else, never a hang.
        assert codes[-1] in (0, -SIGTERM), rank.transcript()
    first_guarded = codes.index(0) if 0 in codes else len(codes)
    assert set(codes[:first_guarded]) <= {-SIGTERM}


def test_yield_is_said_on_the_log(job):
    """A rank that waits for the application's handler says so, once, at the signal."""
    (rank,) = job.world("handlers.py", 1, "deaf", "before", **IMPATIENT)
    rank.wait_for("^step 2$")
    rank.signal()
    wait_until(
        lambda: any("yield" in text or "handler" in text for text in rank.log_lines), "a line on the yield"
    )
    assert rank.outlast(8) == 0

"""What frameworks do to signals, in small: the findings of `test_frameworks.py`, in tests that need no framework."""

import pytest
import torch
from harness import AGENT, NONE, SIGTERM


def test_every_handler_saved_and_restored(job):
    """Lightning restores the handlers of all signals after `fit`, that of the one which wakes the main thread, too."""
    (rank,) = job.world(
        """
        import signal, threading, time
        import torch.distributed as dist

        uncatchable = {signal.SIGKILL, signal.SIGSTOP}
        found = {each: signal.getsignal(each) for each in signal.valid_signals() - uncatchable}
        print(sum(callable(handler) for handler in found.values()), "handlers", flush=True)
        for each, handler in found.items():
            if handler is not None:
                assert signal.signal(each, handler) == handler

        def train():
            dist.init_process_group("gloo")
            print("ready", flush=True)
            while True:
                time.sleep(0.01)

        threading.Thread(target=train, daemon=True).start()
        time.sleep(3600)
        """,
        1,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert rank.report()["outcome"] == "clean"
    assert "1 handlers" in rank.stdout  # of SIGINT: Python's own


def test_an_application_that_uses_the_same_real_time_signal(job):
    """It gets the signal that nobody used, as if we had not been there; a rank can be torn down all the same."""
    program = """
        import os, signal, time
        import torch.distributed as dist
        mine = []
        last = signal.SIGRTMAX
        for signum in range(last - 12, last):
            print(signal.signal(signum, lambda *args: mine.append(args[0])), flush=True)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for signum in range(last - 12, last):
            os.kill(os.getpid(), signum)
        print("ready", len(mine), flush=True)
        while True:
            time.sleep(0.01)
        """
    seen = []
    for mode in (AGENT, NONE):
        rank = job.start(program, mode=mode)
        rank.wait_for("ready 12")
        assert rank.evict() == (0 if mode == AGENT else -SIGTERM), rank.transcript()
        seen.append(rank.stdout)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("where", ["main", "thread", "inside"])
def test_a_handler_put_away_and_the_signal_raised_again(job, where):
    """uvicorn's way: shut down, restore what was there, raise the signal again. Then it is the agent's turn, at once.

    ddtrace's handler does all of it while it runs (`inside`). A main thread that ends then (`thread`) leaves the daemon
    thread that trains its time to get to the last step.
    """
    ranks = job.world(
        """
        import signal, sys, threading, time
        import torch, torch.distributed as dist

        def train():
            dist.init_process_group("gloo")
            weight = torch.nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.SGD([weight], lr=0.1)
            while True:
                weight.grad = torch.ones(1)
                dist.all_reduce(weight.grad)
                optimizer.step()
                print("step", flush=True)
                time.sleep(0.05)
                yield

        def raise_again(*args):
            signal.signal(signal.SIGTERM, original)
            print("shut down", flush=True)
            signal.raise_signal(signal.SIGTERM)

        def serve(training):
            global original
            caught = []
            handler = raise_again if sys.argv[1] == "inside" else lambda *args: caught.append(args)
            original = signal.signal(signal.SIGTERM, handler)
            while not caught:
                next(training)
            raise_again()
            for _ in training if sys.argv[1] == "main" else ():
                pass

        if sys.argv[1] != "thread":
            serve(train())
        else:
            threading.Thread(target=lambda: list(train()), daemon=True).start()
            serve(iter(lambda: time.sleep(0.01), 0))
        """,
        2,
        where,
        AUTOTEARDOWN_GRACE=30,
    )
    for rank in ranks:
        rank.wait_for("step")
    ranks[1].signal()
    assert [rank.outlast(30) for rank in reversed(ranks)] == [0, 143], ranks[1].transcript()
    assert "shut down" in ranks[1].stdout
    reports = job.all_reports()
    # What happens when the application has put its handler away is not at the end of an iteration any more.
    assert {report["outcome"] for report in reports.values()} <= {"clean", "partial"}, reports
    assert len({report["steps"]["stopped_at"] for report in reports.values()}) == 1, reports
    assert ranks[1].phase("yield")["outcome"] == "ok"


def test_exit_callbacks_registered_before_ours(job):
    """coverage's .pth comes before the agent's, so its exit callback would come after the agent's, too late."""
    rank = job.start(
        """
        import atexit, time
        import autoteardown
        import torch.distributed as dist

        for word in ("earliest", "earlier"):
            atexit.register(print, word, flush=True)
        autoteardown.arm()
        for word in ("later", "latest"):
            atexit.register(print, word, flush=True)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """,
        mode=NONE,
        fresh=True,
    )
    rank.wait_for("ready")
    assert rank.evict() == 0, rank.transcript()
    assert rank.stdout.split() == ["ready", "latest", "later", "earlier", "earliest"]
    assert rank.noise == []


def test_a_save_on_the_way_out(job):
    """Lightning saves on any exception, the SystemExit of the agent's included: it may take longer than other exits."""
    rank = job.start(
        """
        import time
        import torch, torch.distributed as dist

        class SlowDisk:
            def __init__(self, path):
                self.file, self.slow = open(path, "wb"), True
            def write(self, data):
                if self.slow:
                    time.sleep(3)
                self.slow = False
                return self.file.write(data)
            def flush(self):
                self.file.flush()

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        try:
            while True:
                weight.grad = torch.ones(1)
                optimizer.step()
                print("step", flush=True)
        except BaseException:
            torch.save({"weight": weight}, SlowDisk("interrupted.pt"))
            raise
        """,
        AUTOTEARDOWN_GRACE=20,
        AUTOTEARDOWN_EXIT_TIMEOUT=1,
    )
    rank.wait_for("step")
    assert rank.evict(20) == 0, rank.transcript()
    assert set(torch.load(job.folder / "interrupted.pt")) == {"weight"}

"""Which thread has to stop, when init, the training and the main program are on threads of their own."""

import signal

import pytest

PROGRAM = """
    import _thread, asyncio, atexit, os, sys, threading, time
    import torch, torch.distributed as dist

    def init():
        dist.init_process_group("gloo")
        dist.barrier()

    def collective():
        # Rank 1 never joins. When it has left, gloo raises here: on a thread that must not go on by then.
        print("ready", flush=True)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            pass
        print("the program goes on", flush=True)

    def compute():
        print("ready", flush=True)
        while dist.is_initialized():
            sum(range(1000))
        print("the program goes on", flush=True)

    def run(*functions):
        for function in functions:
            function()

    async def served():
        # As Ray's async actors: an idle event loop on a thread, on which init has been called.
        init()
        print("ready", flush=True)
        await asyncio.sleep(3600)

    def loop():
        asyncio.run(served())

    def pool(*functions):
        # As Ray's threaded actors: threads that Python has not started, each for one call.
        for function in functions:
            done = threading.Event()
            _thread.start_new_thread(run, (function, done.set))
            if function is init:
                done.wait()

    def one_thread(*functions):
        threading.Thread(target=run, args=functions, daemon=True).start()

    def two_threads(first, second):
        # As Ray Train: init on one thread, the training function on another.
        first()
        one_thread(second)

    if os.environ["RANK"] == "0":
        atexit.register(time.sleep, 1)  # time enough to see who goes on
        {what}
    else:
        init()
    print("main", flush=True)
    threading.Event().wait()
"""
CASES = {
    "one thread, blocked": "one_thread(init, collective)",
    "one thread, busy": "one_thread(init, compute)",
    "two threads, blocked": "two_threads(init, collective)",
    "pool, blocked": "pool(init, collective)",
    "pool, busy": "pool(init, compute)",
    "event loop, idle": "one_thread(loop)",
}


@pytest.mark.parametrize("case", CASES)
def test_the_right_thread_stops(job, case):
    ranks = job.world(PROGRAM.format(what=CASES[case]), 2, AUTOTEARDOWN_GRACE=25)
    for rank in ranks:
        rank.wait_for("^main$")
    ranks[0].wait_for("^ready$")
    assert [ranks[0].evict(25), ranks[1].outlast(25)] == [0, 143], ranks[0].transcript()
    assert "the program goes on" not in ranks[0].stdout
    for rank in ranks:
        # Where rank 0 was blocked in a collective, neither says that all was well.
        expected = ("partial", "aborted") if "blocked" in case else ("clean",)
        assert rank.report()["outcome"] in expected, rank.transcript()
        assert rank.phase("exit")["outcome"] == "ok", rank.transcript()


OVER = """
    import atexit, os, threading, time
    import torch, torch.distributed as dist

    def train():
        dist.init_process_group("gloo")
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        while True:
            weight.grad = torch.ones(1)
            dist.all_reduce(weight.grad)
            optimizer.step()
            stepped.set()

    @atexit.register
    def close():
        print("ready", flush=True)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            time.sleep(0.01)
        print("closed", flush=True)

    stepped = threading.Event()
    threading.Thread(target=train, daemon=True).start()
    stepped.wait()
"""


def test_exit_callbacks_are_not_cut_short(job):
    """The main thread is over, and closes the program down, when the rank that another thread trains is evicted."""
    ranks = job.world(OVER, 2, AUTOTEARDOWN_GRACE=25)
    for rank in ranks:
        rank.wait_for("^ready$")
    assert [ranks[0].evict(25), ranks[1].outlast(25)] == [0, 143], ranks[0].transcript()
    for rank in ranks:
        assert rank.report()["outcome"] == "clean", rank.transcript()
        assert "closed" in rank.stdout, rank.transcript()
        assert rank.noise == [], rank.transcript()


BUSY = """
    import signal, sys, time, types
    import autoteardown
    import torch.distributed as dist

    if "ray" in sys.argv:
        sys.modules["ray._raylet"] = types.ModuleType("ray._raylet")
    if "handler" in sys.argv:
        signal.signal(signal.SIGALRM, lambda signum, frame: print("alarm", flush=True))
    dist.init_process_group("gloo")
    with autoteardown.protect():
        signal.alarm(3)
        print("ready", flush=True)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "what, code, rings",
    [(("ray",), 0, False), (("ray", "handler"), 0, True), ((), -signal.SIGALRM, False)],
    ids=["Ray's", "the application's", "no Ray"],
)
def test_the_alarm_of_a_ray_driver_is_called_off(job, what, code, rings):
    """Its C++ layer sets it before anybody hears of the signal (ray-project/ray#64830). The real one: test_ray.py."""
    (rank,) = job.world(BUSY, 1, *what, AUTOTEARDOWN_GRACE=25)
    rank.wait_for("^ready$")
    assert rank.evict(25) == code, rank.transcript()
    assert ("alarm" in rank.stdout) == rings

"""Which threads are taken to wait in a collective."""

import threading

from harness import wait_until

from autoteardown import thread_stacks
from autoteardown.training.thread import TrainingThread


def function_in(path, body):
    """A function `call(then)` whose code lies in that file."""
    scope = {}
    exec(compile(f"def call(then):\n    return {body}", path, "exec"), scope)
    return scope["call"]


collective = function_in("/site/torch/distributed/distributed_c10d.py", "then()")


def test_the_agents_destroy_is_no_collective_of_the_program():
    """It runs inside torch as well: its thread was then taken for the training thread, and its callbacks for a save."""
    release, idents = threading.Event(), {}
    agents = function_in(thread_stacks.PACKAGE + "process_groups/operations.py", "then()")

    def wait_as(name):
        idents[name] = threading.get_ident()
        release.wait()

    program = threading.Thread(target=collective, args=(lambda: wait_as("program"),))
    program.start()
    # The agent starts its threads with `_thread`, so its own function is their outermost frame.
    thread_stacks.unpatched.start_new_thread(agents, (lambda: collective(lambda: wait_as("agent")),))
    try:
        wait_until(lambda: len(idents) == 2, "both threads")
        assert thread_stacks.in_collective() == [idents["program"]]
        training = TrainingThread()
        training.find(begun=False)
        assert training.ident == idents["program"]
    finally:
        release.set()
        program.join()

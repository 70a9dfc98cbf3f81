"""CPython's own tests of signals, forks and subprocesses have the same results with the agent, test by test."""

import importlib.util
import json

import pytest
from harness import AGENT, NONE, wait_until

QUICK = ["test_threadsignals", "test_fork1", "test_asyncio.test_unix_events"]
SLOW = ["test_signal", "test_faulthandler", "test_subprocess", "test_thread", "test_threading"]

# Armed: what is written to a wake-up fd of the program's own comes from our thread, a moment after the handler ran and
# not always in one piece; these look for it at once, or count what is in it. Those about pending signals block the
# eviction signal in no thread but their own.
DIFFERENT = {
    "armed": {
        "test.test_signal.WakeupFDTests",
        "test.test_signal.WakeupSignalTests",
        "test.test_signal.WakeupSocketSignalTests",
    },
    "on": set(),
}


def outcomes(job, module, mode, *options):
    """What became of each test of a module, and what the failed ones said."""
    rank = job.start("suite.py", f"test.{module}", *options, mode=mode, fresh=True)
    rank.wait(280)
    found = json.loads((job.folder / "outcomes.json").read_text())
    (job.folder / "outcomes.json").unlink()
    wait_until(lambda: not job.survivors(), "the end of what it started")
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("state", ["on", "armed"])
@pytest.mark.parametrize("module", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_comes_out_as_without_us(job, module, state):
    try:
        found = importlib.util.find_spec(f"test.{module}")
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"this interpreter ships no test.{module}")
    options = ["group"] if state == "armed" else []
    without = outcomes(job, module, NONE, *options)
    with_us = outcomes(job, module, AGENT, *options)
    seen = with_us["seen"]
    differ = {
        test: (outcome, seen.get(test), with_us["whys"].get(test))
        for test, outcome in without["seen"].items()
        if seen.get(test) != outcome and test.rpartition(".")[0] not in DIFFERENT[state]
    }
    if differ:  # some depend on the machine's mood: whatever is not the same twice is
        again = outcomes(job, module, AGENT, *options)["seen"]
        differ = {test: why for test, why in differ.items() if again.get(test) != without["seen"][test]}
    assert not differ, "\n".join(f"{test}: {why}" for test, why in differ.items())
    assert "ok" in seen.values()

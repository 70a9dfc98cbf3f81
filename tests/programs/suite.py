"""Runs tests of CPython's own. `suite.py MODULE [group]`: writes what became of each, as JSON."""

import json
import os
import sys
import unittest


class Outcomes(unittest.TestResult):
    """What became of each test, by its id."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def _note(self, test, outcome):
        # A class or module that is skipped as a whole has no id of its own.
        self.seen[test.id()] = max(self.seen.get(test.id(), ""), outcome)

    def addSuccess(self, test):
        self._note(test, "ok")

    def addSkip(self, test, reason):
        self._note(test, "skipped")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self._note(test, "wrong")

    def addError(self, test, error):
        super().addError(test, error)
        self._note(test, "wrong")

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self._note(test, "wrong")

    def addExpectedFailure(self, test, error):
        self._note(test, "ok")


def main():
    """Run one module."""
    name, group = sys.argv[1], "group" in sys.argv
    if group:
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if os.environ.get("AUTOTEARDOWN") == "1":  # else there is nothing to compare
            from autoteardown.signals import interception

            assert interception.interceptor.armed
    del sys.argv[1:]  # some of the tests look at it
    outcomes = Outcomes()
    unittest.defaultTestLoader.loadTestsFromName(name).run(outcomes)
    if group:
        dist.destroy_process_group()
    whys = {test.id(): why for test, why in outcomes.failures + outcomes.errors}
    with open("outcomes.json", "w") as file:
        json.dump({"seen": outcomes.seen, "whys": whys}, file)


if __name__ == "__main__":
    main()

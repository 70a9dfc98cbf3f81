"""Fixtures of the tests on the simulated accelerator."""

import pytest
from simulated_accelerator import Device, build


@pytest.fixture(scope="session")
def built():
    """The extension is there, or the tests are skipped with the reason."""
    try:
        build.build()
    except build.CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.fixture
def devices(built, tmp_path):
    """The accelerators of this test's job. No fault of theirs goes unseen: a test that expects one takes it away."""
    made = Device(tmp_path)
    yield made
    unexpected = [fault for fault in made.faults if fault not in made.expected]
    assert not unexpected, made.transcript()


@pytest.fixture
def ranks_on(job, devices):
    """Starts a world on the simulated accelerator and waits until all of it is there."""

    def start(role, ranks=2, *arguments, each=None, said="ready", settings=None, **options):
        each = each or {}
        own = {}
        for rank, changes in each.items():
            changes = dict(changes)
            own[rank] = {**devices.settings(**changes.pop("settings", {})), **changes}
        options = {"AUTOTEARDOWN_GRACE": 12, **devices.settings(**(settings or {})), **options}
        world = job.world("device.py", ranks, role, *arguments, each=own, **options)
        for rank in world:
            rank.wait_for(f"^{said}")
        return world

    return start

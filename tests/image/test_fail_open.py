"""A bug of the agent never costs the host program: each function that a host calls raises, in turn.

Which those are is found out by running the host once with every function of the package writing down that it was
called, so that a new one is in here from its first day. `programs/breaker.py` breaks them from outside.
"""

import ast
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness import AGENT, NONE, PROGRAMS, Job, environment, free_port, wait_until

import autoteardown

sys.path.insert(0, str(PROGRAMS))
import breaker

PACKAGE = Path(autoteardown.__file__).parent
MODULES = sorted(breaker.module_of(path) for path in breaker.files(PACKAGE) if any(breaker.functions(path)))
AT_ONCE = 3  # jobs


@pytest.fixture(scope="module")
def new_job(tmp_path_factory, fork_servers):
    jobs = []

    def make():
        jobs.append(Job(tmp_path_factory.mktemp("job"), fork_servers))
        return jobs[-1]

    yield make
    for each in jobs:
        each.close()


def called(path, module):
    names = set(path.read_text().split())
    return sorted(name for name in names - breaker.NEVER if name.partition(":")[0] == module)


def in_parallel(names, start, complaint):
    """Start something for each name, a few at a time; what `complaint` makes of each, where it does complain."""
    found, running = [], []
    for name in [*names, *[None] * AT_ONCE]:
        if running and (name is None or len(running) == AT_ONCE):
            broken, *started = running.pop(0)
            said = complaint(*started)
            found += [f"{broken} broken: {said}"] if said else []
        if name is not None:
            running.append((name, *start(name)))
    assert not found, "\n\n".join(found)


# -- start-up --------------------------------------------------------------------------------------------------------

# As much of torch as its importer meets of us, in a few files that are read in milliseconds.
TORCH = {
    "torch/__init__.py": "import signal\nfrom torch.serialization import save\nimport torch.distributed\n",
    "torch/serialization.py": "def save(what, where):\n    print('saved', what)\n",
    "torch/distributed/__init__.py": "from torch.distributed.distributed_c10d import *\n",
    "torch/distributed/distributed_c10d.py": """
        here = False
        def init_process_group(backend):
            global here
            here = True
        def destroy_process_group():
            global here
            here = False
        def is_initialized():
            return here
        def get_rank(group=None):
            return 0
        def get_world_size(group=None):
            return 1
        def get_backend(group=None):
            return "gloo"
        def _get_default_store():
            return None
    """,
    "torch/optim/__init__.py": "",
    "torch/optim/optimizer.py": """
        hooks = []
        class Handle:
            def remove(self):
                hooks.clear()
        def register_optimizer_step_post_hook(hook):
            hooks.append(hook)
            return Handle()
        def step():
            for hook in hooks:
                hook(None, (), {})
    """,
}
HOST = """
    import signal, sys
    import torch, torch.distributed as dist, torch.optim.optimizer as optim
    for _ in range(2):
        dist.init_process_group("gloo")
        optim.step()
        torch.save("model", "file")
        dist.destroy_process_group()
    old = signal.signal(signal.SIGTERM, lambda *args: None)
    print(old, signal.signal(signal.SIGTERM, old) is old, dist.init_process_group.__module__)
    sys.exit(7)
"""
HELPER = "print('ran'); raise SystemExit(7)"


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    for name, text in TORCH.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.mark.timeout(1200)  # an interpreter for each function
@pytest.mark.parametrize("program, error", [(HOST, "RuntimeError"), (HELPER, "SystemExit")])
def test_start_up(tmp_path, torch_folder, program, error):
    """From the `.pth` file on: whatever is broken there, a program runs as without the agent."""

    def package(folder, **environ):
        ignored = shutil.ignore_patterns("cli", "drills")
        shutil.copytree(PACKAGE, tmp_path / folder / "autoteardown", ignore=ignored)
        for path in breaker.files(tmp_path / folder / "autoteardown"):
            if "CALLED" in environ or environ["BREAK"].partition(":")[0] == breaker.module_of(path):
                path.write_text(ast.unparse(breaker.rewrite(path, environ)))
        return tmp_path / folder

    def run(folder=None):
        env = environment(AGENT if folder else NONE, "", AUTOTEARDOWN_RUNTIME_DIR=tmp_path / "runtime")
        env["PYTHONPATH"] = f"{folder or ''}{os.pathsep}{torch_folder}"
        argv = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
        ours = [line for line in done.stderr.splitlines() if line.startswith("autoteardown")]
        noise = [line for line in done.stderr.splitlines() if not line.startswith("autoteardown")]
        return (done.returncode, done.stdout, noise), ours

    expected, _ = run()
    path = tmp_path / "called"
    assert run(package("whole", CALLED=str(path))) == (expected, [])
    names = set(path.read_text().split()) - breaker.NEVER
    assert "startup:start" in names
    wrong, said = {}, 0
    for name in sorted(names):
        got, ours = run(package(name.replace(":", "-"), BREAK=name, BREAK_WITH=error))
        if got != expected or len(ours) > 2:  # two hooks that need it, or two inits
            wrong[name] = got, ours
        said += len(ours)
    assert said > len(names) / 3, "most of them cannot fail unsaid"
    assert not wrong, "\n".join(f"{name}: {got}" for name, got in wrong.items())


# -- a whole life ----------------------------------------------------------------------------------------------------


def live(job, *args, **options):
    return job.world("whole_life.py", 2, *args, SECOND_PORT=free_port(), **options)


def repeats(rank):
    """Whether our lines are more than one for each process: the rank, its DataLoader worker, its other child."""
    return len(rank.stderr.splitlines()) > 3


def outcome(rank):
    """What the world sees of a program, and what is left of its stderr without our lines."""
    try:
        rank.wait(20)
    except AssertionError:
        rank.signal(signal.SIGKILL)
        rank.wait()
    noise = [line for line in rank.noise if not line.startswith("autoteardown: ")]
    return rank.code, rank.stdout, noise


@pytest.fixture(scope="module")
def life(new_job):
    """What a life without the agent looks like, and all that a life with it calls."""
    without, job = new_job(), new_job()
    expected = [outcome(rank) for rank in live(without, mode=NONE)]
    assert [(code, noise) for code, _, noise in expected] == [(7, [])] * 2, expected
    for rank, each in zip(live(job, CALLED=job.folder / "called"), expected):
        assert outcome(rank) == each, rank.transcript()
    return expected, job.folder / "called"


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_a_whole_life(new_job, life, module):
    """Init, steps, saves, workers, forks, handlers, destroy, init again: as without the agent, and one line of ours."""
    expected, path = life

    def complaint(*ranks):
        for rank, each in zip(ranks, expected):
            if outcome(rank) != each or repeats(rank):
                return rank.transcript()
        return None

    in_parallel(called(path, module), lambda name: live(new_job(), BREAK=name), complaint)


# -- an eviction -----------------------------------------------------------------------------------------------------


def evict(job, **env):
    ranks = live(job, "train", **env)
    for rank in ranks:
        rank.wait_for("^step 3$")
    ranks[1].signal()
    return ranks


@pytest.fixture(scope="module")
def eviction(new_job):
    """All that an eviction calls."""
    job = new_job()
    peer, signalled = evict(job, CALLED=job.folder / "called")
    assert signalled.outlast() == 0, signalled.transcript()
    assert peer.outlast() == 143, peer.transcript()
    return job.folder / "called"


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_an_eviction(new_job, eviction, module):
    """The signalled rank leaves in time with the right code, or dies of the signal as without the agent."""

    def complaint(peer, signalled):
        code = signalled.outlast()
        unguarded = code == -signal.SIGTERM and "may not be guarded" in signalled.stderr
        codeless = code == 1 and "exit_code" in signalled.stderr  # it cannot know the code; it is in time
        if code == 0 or unguarded or codeless:
            # Without us it loses its connection; the test ends it if it has to wait for that.
            code = peer.outlast(20)
            return None if code in (143, 1) else f"the peer: {peer.transcript()}"
        peer.outlast(0)
        return signalled.transcript()

    in_parallel(called(eviction, module), lambda name: evict(new_job(), BREAK=name), complaint)


def test_a_peer_that_cannot_begin(new_job):
    """A notice that comes to nothing does not make the rank deaf to its own signal."""
    idle = """
        import breaker
        breaker.swap()
        import time
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
        """
    whole, broken = new_job().world(idle, 2, each={1: {"BREAK": "rank.guard:Guard._begin"}})
    for rank in (whole, broken):
        rank.wait_for("^ready$")
    assert whole.evict() == 0, whole.transcript()
    wait_until(lambda: "to stop with a peer failed" in broken.stderr, "the notice")
    assert broken.evict() == 0, broken.transcript()

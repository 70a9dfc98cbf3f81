"""`docker/slurm/epilog.sh` as `Epilog` of a real SLURM."""

import re
from pathlib import Path

import pytest
from harness import wait_until
from jobs import BIN, SHAPES, environment, ranks_left, trains

EPILOG = (Path(__file__).parents[2] / "docker" / "slurm" / "epilog.sh").read_text()

# torchrun leaves the step (a session of its own, which proctrack/pgid does not follow), and the job ends without it.
LEFT_BEHIND = f"""#!/bin/bash
setsid --fork {SHAPES["torchrun"]}
while [ ! -e $SLURM_JOB_ID.over ]; do sleep 0.2; done
"""


@pytest.fixture
def epilog(cluster_of):
    """A cluster with the epilog, in which the program is at this path; what it logs is in the file `node.log`."""

    def up(program):
        cluster = cluster_of(proctrack="pgid")
        script = EPILOG.replace("autoteardown=/usr/local/bin/autoteardown", f"autoteardown={program}")
        script = script.replace(
            "export PATH=", f"export AUTOTEARDOWN_RUNTIME_DIR={cluster.folder}/registry PATH="
        )
        cluster.write("epilog.sh", script, 0o755)
        # Stands in for syslog, which a container seldom has.
        logger = cluster.folder / "logger"
        logger.write_text(f'#!/bin/sh\necho "$@" >> {cluster.folder}/node.log\n')
        logger.chmod(0o755)
        cluster.command("mount", "--bind", logger, "/usr/bin/logger")
        return cluster

    return up


def leave_behind(cluster):
    """A job that trains outside of what SLURM knows as its own."""
    env = environment(cluster, "callback", 20)
    job = cluster.submit(
        LEFT_BEHIND, "--time=5", env=env, name=f"left{len(list(cluster.folder.glob('*.sbatch')))}"
    )
    trains(job)
    return job


def end(cluster, job):
    (cluster.folder / f"{job}.over").touch()
    job.wait_for_state("COMPLETED")


def node_log(cluster):
    path = cluster.folder / "node.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.slurm
def test_it_drains_the_jobs_ranks_and_nobody_elses(epilog):
    """Also those of `torchrun --standalone`, whose run id is a UUID that SLURM does not know."""
    cluster = epilog(BIN / "autoteardown")
    job, other = leave_behind(cluster), leave_behind(cluster)
    end(cluster, job)
    assert len(re.findall(r"done: clean", job.output)) == 2, job.output
    assert "SIGTERM" not in other.output
    wait_until(lambda: len(ranks_left(cluster)) == 3, "torchrun and the ranks of the other job")
    assert node_log(cluster) == ""


@pytest.mark.slurm
def test_without_the_program_the_nodes_log_says_so(epilog):
    cluster = epilog("/opt/nowhere/autoteardown")
    job = leave_behind(cluster)
    end(cluster, job)
    expected = f"job {job}: no /opt/nowhere/autoteardown on this node: ranks that have outlived the job are left alone"
    wait_until(lambda: expected in node_log(cluster), "a line in the node's log")
    assert len(ranks_left(cluster)) == 3
    assert "drain" not in cluster.command("sinfo", "-h", "-N", "-o", "%t")


@pytest.mark.slurm
def test_a_drain_that_fails_is_logged_and_costs_no_node(epilog):
    """SLURM puts a node whose epilog fails into the state DRAIN."""
    cluster = epilog("/bin/false")
    job = cluster.submit("#!/bin/bash\ntrue\n")
    job.wait_for_state("COMPLETED")
    wait_until(lambda: "drain ended with 1" in node_log(cluster), "a line in the node's log")
    assert "drain" not in cluster.command("sinfo", "-h", "-N", "-o", "%t")

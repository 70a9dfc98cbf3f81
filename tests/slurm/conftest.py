"""Fixtures: a cluster for each test. It is up within two seconds, and no test waits for the nodes of another."""

import pytest
from cluster import Cluster, why_not


@pytest.fixture
def cluster_of():
    """Brings clusters up, by `Cluster`'s arguments; they are down when the test is over."""
    why = why_not()
    if why:
        pytest.skip(why)
    clusters = []

    def up(**options):
        clusters.append(Cluster(**options))
        return clusters[-1]

    yield up
    for cluster in clusters:
        cluster.down()


@pytest.fixture
def cluster(cluster_of):
    """One in which SLURM signals every process of a step, as on most clusters."""
    return cluster_of()

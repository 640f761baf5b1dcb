"""Jobs on a real SLURM cluster of two nodes on this machine, through profiles/slurm.

pytest -m long tests/test_slurm.py   # Debian: apt-get install slurmctld slurmd slurm-client munge; pip: extra slurm
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "faults"))
import cluster
from trial import Trial

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())]


@pytest.fixture(scope="module")
def environment():
    with cluster.cluster() as environment:
        yield environment


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial(tmp_path_factory.mktemp("trial") / "project")


@pytest.mark.parametrize("name", cluster.FAULTS)
def test_job_ends_as_it_does_without_a_cluster(name, trial, environment, tmp_path):
    assert cluster.outcome(name, trial, tmp_path / "case", environment) == ""

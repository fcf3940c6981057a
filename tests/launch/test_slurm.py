"""launch/slurm.sbatch as Slurm would run it."""

import pytest

from tests.launch.slurm_scenarios import SCENARIOS, submitted
from tests.launch.stage import LAUNCH


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, tmp_path):
    SCENARIOS[name](LAUNCH / "slurm.sbatch", tmp_path)


def test_options():
    submitted(LAUNCH / "slurm.sbatch")

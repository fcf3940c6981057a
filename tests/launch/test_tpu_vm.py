"""launch/tpu_vm.sh and tpu_worker.sh against a played cloud."""

import json
import os
import shlex
import subprocess

import pytest

from tests.launch.stage import Stage
from tests.launch.tpu_scenarios import DONE, SCENARIOS

GCLOUD = "/usr/bin/gcloud"


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, tmp_path):
    SCENARIOS[name](Stage(tmp_path))

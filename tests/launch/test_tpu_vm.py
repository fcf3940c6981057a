"""launch/tpu_vm.sh and tpu_worker.sh against a played cloud."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch.stage import LAUNCH, Stage
from tests.launch.tpu_scenarios import DONE, SCENARIOS

GCLOUD = shutil.which("gcloud")


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, tmp_path):
    SCENARIOS[name](Stage(tmp_path))


@pytest.mark.skipif(GCLOUD is None, reason="no Google Cloud SDK on the PATH")
def test_gcloud_knows_every_call(tmp_path):
    """The SDK's own linter, which needs no network, reads what the script calls and what the README says to call."""
    stage = Stage(tmp_path)
    played = stage.play("watch", states=["FAILED"], runs=[{"codes": [1, 1]}, DONE])
    assert played.code == 0, played.errors
    calls = sorted({shlex.join(["gcloud", *call]) for call in stage.calls()})
    assert len(calls) >= 6
    readme = re.sub(r"\\\n\s*", "", (LAUNCH / "README.md").read_text())
    documented = re.findall(r"^    (?:\w+=\$\()?(gcloud .*?)\)?$", readme, re.MULTILINE)
    assert len(documented) >= 8
    calls += [re.sub(r"\$(\w+)", lambda match: match[1].lower(), call) for call in documented]
    wrong = "gcloud compute tpus queued-resources create x --node-id=x --accelerator-typ=v6e-8 --runtime-version=v --zone=z"
    found = _lint([wrong, *calls], tmp_path)
    assert "did you mean '--accelerator-type'" in found.pop(wrong)
    assert found == dict.fromkeys(calls)


def _lint(calls, tmp_path):
    """{call: error or None}"""
    (tmp_path / "calls.json").write_text(json.dumps([{"command_string": call} for call in calls]))
    environ = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    words = [GCLOUD, "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'calls.json'}"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=True)
    # In the order given; the strings that come back have example values in place of words such as PROJECT.
    return dict(zip(calls, (result["error_message"] for result in json.loads(done.stdout)), strict=True))

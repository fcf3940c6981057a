"""The launch files before linters and the clouds' own schemas and parsers."""

import math
import pathlib
import subprocess
import sys
import typing
import warnings
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

REPOSITORY = pathlib.Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
YAML = "{extends: default, rules: {line-length: {max: 128}, comments: {min-spaces-from-content: 2}}}"
LINTERS = {
    "tpu_vm.sh": ["shellcheck", "--severity=style"],
    "tpu_worker.sh": ["shellcheck", "--severity=style"],
    "slurm.sbatch": ["shellcheck", "--severity=style"],
    "gke_jobset.yaml": ["yamllint", "--strict", "-d", YAML],
    "sky_tpu.yaml": ["yamllint", "--strict", "-d", YAML],
    "sky_gpu.yaml": ["yamllint", "--strict", "-d", YAML],
    "Dockerfile": ["hadolint"],
}


def _lint(words: list[str], text: str = "") -> None:
    tool = pathlib.Path(sys.executable).parent / words[0]
    done = subprocess.run([tool, *words[1:]], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", LINTERS)
def test_linter_finds_nothing(name):
    _lint([*LINTERS[name], str(LAUNCH / name)])


def test_every_file_has_a_linter():
    assert {path.name for path in LAUNCH.iterdir()} == {*LINTERS, "README.md"}


def test_dockerfile_copies_what_exists():
    words = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    copied = {source for line in words if line[:1] == ["COPY"] for source in line[1:-1]}
    assert {"cmd_jax", "configs", "requirements.lock"} <= copied
    assert [source for source in copied if not (REPOSITORY / source).exists()] == []


def test_jobset_follows_the_schemas():
    """The JobSet by the models of its API, its Jobs and Pods by Kubernetes' schema; unknown fields are refused."""
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = (job["template"].pop("spec") for job in manifest["spec"]["replicatedJobs"])
    JobsetV1alpha2JobSet.model_validate(manifest)
    _refuse_unknown_fields(manifest, JobsetV1alpha2JobSet, "")
    actions = {rule["action"] for rule in manifest["spec"]["failurePolicy"]["rules"]}
    assert actions <= {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}  # the models take any text
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": job}
    kubernetes_validate.validate(whole, "1.37", strict=True)


def test_jobset_stops_restarts_and_fits_its_slice():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container, selector = pod["containers"][0], pod["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    rule = job["podFailurePolicy"]["rules"][0]
    stops = {"containerName": container["name"], "operator": "In", "values": [64, 65, 70]}
    assert (rule["action"], rule["onExitCodes"]) == ("FailJob", stops)
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # pods are replaced together
    assert pod["terminationGracePeriodSeconds"] >= 60  # to save
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "--distributed" in container["args"]
    assert any(word.startswith("--workdir=gs://BUCKET/") for word in container["args"])


@pytest.mark.parametrize(
    ("name", "env"), [("sky_tpu.yaml", ("WORKDIR", "gs://bucket/run")), ("sky_gpu.yaml", ("BUCKET", "bucket"))]
)
def test_skypilot_accepts(name, env, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # written to when SkyPilot is imported
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        import sky  # seconds to import
        from sky.jobs import recovery_strategy  # noqa: F401 - registers the strategies
        from sky.utils import registry

    task = sky.Task.from_yaml_config(yaml.safe_load((LAUNCH / name).read_text()), env_overrides=[env])
    resource = next(iter(task.resources))
    registry.JOBS_RECOVERY_STRATEGY_REGISTRY.from_str(resource.job_recovery["strategy"])
    assert resource.job_recovery["recover_on_exit_codes"] == [75]
    assert resource.use_spot
    for part in (task.setup, task.run):
        _lint(["shellcheck", "--shell=bash", "-"], part)


def _refuse_unknown_fields(given: Any, model: Any, where: str) -> None:
    """Pydantic ignores unknown fields itself."""
    if isinstance(given, list):
        for number, each in enumerate(given):
            _refuse_unknown_fields(each, model, f"{where}[{number}]")
    elif isinstance(given, dict) and hasattr(model, "model_fields"):
        fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
        for name, value in given.items():
            assert name in fields, f"unknown field {where}.{name}"
            inner = [fields[name]]
            while inner and not hasattr(inner[0], "model_fields"):
                inner = [part for outer in inner for part in typing.get_args(outer) if part is not type(None)]
            if inner:
                _refuse_unknown_fields(value, inner[0], f"{where}.{name}")

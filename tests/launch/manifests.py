"""Checks of the files that clouds read, by the clouds' own schemas and parsers; each raises on what it refuses."""

import pathlib
import subprocess
import sys
import typing
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

TOOLS = pathlib.Path(sys.executable).parent
KUBERNETES = "1.37"
SKY = {"sky_tpu.yaml": [("WORKDIR", "gs://bucket/run")], "sky_gpu.yaml": [("BUCKET", "bucket")]}


class Refused(Exception):
    """What a tool printed."""


def tool(*words: str | pathlib.Path) -> None:
    """Runs a linter; findings of every severity count."""
    done = subprocess.run([TOOLS / words[0], *words[1:]], capture_output=True, text=True, check=False)
    if done.returncode or done.stdout:
        raise Refused(done.stdout + done.stderr)


def shell(path: pathlib.Path) -> None:
    tool("shellcheck", "--severity=style", path)


def dockerfile(path: pathlib.Path) -> None:
    tool("hadolint", path)


def yaml_style(path: pathlib.Path) -> None:
    rules = "{extends: default, rules: {line-length: {max: 128}, comments: {min-spaces-from-content: 2}}}"
    tool("yamllint", "--strict", "-d", rules, path)


def jobset(path: pathlib.Path) -> None:
    """The JobSet's own fields by the models of its API, its Jobs and their Pods by Kubernetes' schema; unknown fields count."""
    manifest = yaml.safe_load(path.read_text())
    if (manifest["apiVersion"], manifest["kind"]) != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        raise Refused(f"{manifest['apiVersion']} {manifest['kind']}")
    jobs = [(job["name"], job["template"].pop("spec")) for job in manifest["spec"]["replicatedJobs"]]
    JobsetV1alpha2JobSet.model_validate(manifest)
    _known(manifest, JobsetV1alpha2JobSet, "")
    actions = {rule["action"] for rule in manifest["spec"]["failurePolicy"]["rules"]}
    if not actions <= {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}:  # the models take any text
        raise Refused(f"actions {actions}")
    for name, spec in jobs:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def sky(path: pathlib.Path) -> None:
    """SkyPilot's parser, and its shell parts by shellcheck."""
    import sky  # seconds to import

    task = sky.Task.from_yaml_config(yaml.safe_load(path.read_text()), env_overrides=SKY[path.name])
    resource = next(iter(task.resources))
    if resource.job_recovery["recover_on_exit_codes"] != [75] or not resource.use_spot:
        raise Refused(f"{path}: recovery {resource.job_recovery}")
    for part in (task.setup, task.run):
        done = subprocess.run([TOOLS / "shellcheck", "--shell=bash", "-"], input=part, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(done.stdout)


def _known(given: Any, model: Any, where: str) -> None:
    """Refuses fields that a model of pydantic does not have; it ignores them itself."""
    if isinstance(given, list):
        for number, each in enumerate(given):
            _known(each, model, f"{where}[{number}]")
        return
    if not isinstance(given, dict) or not hasattr(model, "model_fields"):
        return
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for name, value in given.items():
        if name not in fields:
            raise Refused(f"{where}.{name} is not known; {sorted(fields)} are")
        inner = [fields[name]]
        while inner and not hasattr(inner[0], "model_fields"):
            inner = [part for outer in inner for part in typing.get_args(outer) if part is not type(None)]
        if inner:
            _known(value, inner[0], f"{where}.{name}")

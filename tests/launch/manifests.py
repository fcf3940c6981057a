"""Checks of the files that clouds read, by the clouds' own schemas and parsers; each raises on what it refuses."""

import json
import math
import pathlib
import re
import subprocess
import sys
import typing
import warnings
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

REPOSITORY = pathlib.Path(__file__).parents[2]
TOOLS = pathlib.Path(sys.executable).parent
KUBERNETES = "1.37"
SKY = {"sky_tpu.yaml": [("WORKDIR", "gs://bucket/run")], "sky_gpu.yaml": [("BUCKET", "bucket")]}


class Refused(Exception):
    """What a tool printed."""


# What the tools raise for a file they refuse; pydantic's and SkyPilot's are ValueErrors, yaml's the last.
REFUSALS = (Refused, ValueError, KeyError, kubernetes_validate.ValidationError, yaml.YAMLError)


def tool(*words: str | pathlib.Path) -> None:
    """Runs a linter; findings of every severity count."""
    done = subprocess.run([TOOLS / words[0], *words[1:]], capture_output=True, text=True, check=False)
    if done.returncode or done.stdout:
        raise Refused(done.stdout + done.stderr)


def shell(path: pathlib.Path) -> None:
    tool("shellcheck", "--severity=style", path)


def dockerfile(path: pathlib.Path) -> None:
    tool("hadolint", path)


def image(path: pathlib.Path) -> None:
    """What no linter of Dockerfiles says: what is copied exists, versions are locked, the program runs as no root."""
    lines = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    copied = [source for line in words if line[0] == "COPY" for source in line[1:-1]]
    missing = [source for source in copied if not (REPOSITORY / source).exists()]
    installed = " ".join(" ".join(line) for line in words if line[0] == "RUN")
    entry = json.loads(next(" ".join(line[1:]) for line in words if line[0] == "ENTRYPOINT"))
    extras = set(re.search(r"^EXTRAS: (.*)$", path.read_text().replace("# ", ""), re.MULTILINE)[1].replace(",", " ").split())
    known = set(re.findall(r"^(\w+) =$", (REPOSITORY / "setup.cfg").read_text(), re.MULTILINE))
    facts = {
        f"{missing} exist": not missing,
        "code and configurations are copied": {"cmd_jax", "configs"} <= set(copied),
        "versions are locked": "--constraint requirements.lock" in installed and "requirements.lock" in copied,
        "not root": [line[1] for line in words if line[0] == "USER"][-1:] == ["1000"] and "--uid 1000" in installed,
        "the program": entry == ["python", "-m", "cmd_jax.main"],
        "extras are ours": extras - {"(CUDA)", "or", "cpu"} <= known and {"gpu", "tpu"} <= extras,
    }
    wrong = [fact for fact, holds in facts.items() if not holds]
    if wrong:
        raise Refused(f"not so: {', '.join(wrong)}")


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
        _as_meant(spec)


def _as_meant(job: dict[str, Any]) -> None:
    """What no schema says: the pods cover the slice, stop codes end it, pods are not replaced singly, spot nodes take them."""
    pod = job["template"]["spec"]
    container, selector = pod["containers"][0], pod["nodeSelector"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    rule = job["podFailurePolicy"]["rules"][0]
    tolerated = {item["key"]: item["value"] for item in pod["tolerations"]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    facts = {
        "pods times chips is the topology": job["parallelism"] == job["completions"]
        and job["parallelism"] * chips == math.prod(sides),
        "64, 65 and 70 stop": (rule["action"], rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"])
        == ("FailJob", "In", [64, 65, 70]),
        "the rule names the container": rule["onExitCodes"]["containerName"] == container["name"],
        "pods are not replaced singly": (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never"),
        "time to save": pod["terminationGracePeriodSeconds"] >= 60,
        "spot is tolerated": tolerated["cloud.google.com/gke-spot"] == selector["cloud.google.com/gke-spot"],
        "volumes are mounted": mounts == {volume["name"] for volume in pod["volumes"]},
        "gs:// work directory": any(word.startswith("--workdir=gs://BUCKET/") for word in container["args"]),
        "distributed": "--distributed" in container["args"],
    }
    wrong = [fact for fact, holds in facts.items() if not holds]
    if wrong:
        raise Refused(f"not so: {', '.join(wrong)}")


def sky(path: pathlib.Path) -> None:
    """SkyPilot's parser, and its shell parts by shellcheck."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        import sky  # seconds to import
        from sky.jobs import recovery_strategy  # noqa: F401 - registers the strategies
        from sky.utils import registry

    task = sky.Task.from_yaml_config(yaml.safe_load(path.read_text()), env_overrides=SKY[path.name])
    resource = next(iter(task.resources))
    registry.JOBS_RECOVERY_STRATEGY_REGISTRY.from_str(resource.job_recovery["strategy"])
    if resource.job_recovery["recover_on_exit_codes"] != [75] or not resource.use_spot:
        raise Refused(f"{path}: recovery {resource.job_recovery}")
    for part in (task.setup, task.run):
        done = subprocess.run(
            [TOOLS / "shellcheck", "--shell=bash", "-"], input=part, capture_output=True, text=True, check=False
        )
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

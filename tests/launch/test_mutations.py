"""One thing broken in a launch file: its check must notice."""

import shutil

import pytest

from tests.launch import manifests, slurm_scenarios, tpu_scenarios
from tests.launch.stage import LAUNCH, Stage

ALL = " --worker=all"
TPU = [  # script, what stands there, what instead, the scenario that must fail
    ("tpu_vm.sh", "1:64 | 1:65 | 1:70)", "1:64 | 1:65)", "not_finite"),
    ("tpu_vm.sh", "1:64 | 1:65 | 1:70)", "1:64 | 1:65 | 1:70 | 1:75)", "saved"),
    ("tpu_vm.sh", "1:64 | 1:65 | 1:70)", "1:64 | 1:65 | 1:70 | 1:1)", "crashed"),
    ("tpu_vm.sh", "1:75) failures=0;", "1:75)", "crashed"),
    ("tpu_vm.sh", "&& code=$reason", "&& true", "stop_code_of_another_worker"),
    ("tpu_vm.sh", 'ssh "$NAME" --worker=all', 'ssh "$NAME"', "success"),
    ("tpu_vm.sh", 'cmd-jax.tgz" --worker=all', 'cmd-jax.tgz"', "success"),
    ("tpu_vm.sh", "$(printf '%q ' \"--workdir=", "$(printf '%s ' \"--workdir=", "quoting"),
    ("tpu_vm.sh", 'SETUP=$(printf %q "$SETUP")', "SETUP='$SETUP'", "quoting"),
    ("tpu_vm.sh", "spot=(--spot)", "spot=()", "success"),
    ("tpu_vm.sh", "[[ $SPOT == 0 ]] || spot", "spot", "on_demand"),
    ("tpu_vm.sh", "SUSPENDING:* | SUSPENDED:* | FAILED:*", "SUSPENDING:* | FAILED:*", "suspended"),
    ("tpu_vm.sh", "SUSPENDING:* | SUSPENDED:* | FAILED:*", "SUSPENDED:* | FAILED:*", "suspending"),
    ("tpu_vm.sh", "SUSPENDING:* | SUSPENDED:* | FAILED:*", "SUSPENDING:* | SUSPENDED:*", "request_failed"),
    ("tpu_vm.sh", "ACTIVE: | ACTIVE:PREEMPTED |", "ACTIVE: |", "node_preempted"),
    ("tpu_vm.sh", "[[ -z $before ]] || return 1", "true", "requests_fail_forever"),
    ("tpu_vm.sh", "        installed=0\n        create", "        create", "suspended"),
    ("tpu_vm.sh", "delete || { ((code", "true || { ((code", "success"),
    ("tpu_vm.sh", "|| { ((code != 0)) || code=1; }", "|| true", "delete_refused_forever"),
    ("tpu_vm.sh", "trap finish EXIT", "true", "bad_data"),
    ("tpu_vm.sh", "trap 'interrupted 143' TERM", "trap 'interrupted 0' TERM", "interrupted_while_waiting"),
    ("tpu_vm.sh", "[[ $KEEP == 1 ]]", "[[ -z $KEEP ]]", "kept"),
    ("tpu_vm.sh", "    claim\n    trap finish", "    trap finish", "two_at_once"),
    ("tpu_vm.sh", "^cmd-jax[a-z0-9-]*$", "^[a-z0-9-]*$", "usage"),
    ("tpu_vm.sh", "== gs://* ]]", "!= '' ]]", "usage"),
    ("tpu_vm.sh", "--format='value(state.state)'; }", "--format='value(state.state)' || true; }", "no_answer"),
    ("tpu_vm.sh", 'delete "$NAME" --force', 'delete "$NAME"', "delete"),
    ("tpu_vm.sh", "bash cmd-jax/launch/tpu_worker.sh stop; rm", "true; rm", "killed_and_rerun"),
    ("tpu_worker.sh", "if ! flock --nonblock 9", "if false", "connection_lost"),
    ("tpu_worker.sh", "return 75", "return 0", "connection_lost"),
    ("tpu_worker.sh", "--constraint requirements.lock ", "", "success"),
    ("tpu_worker.sh", "cmd_jax.main --distributed", "cmd_jax.main", "success"),
    ("tpu_worker.sh", 'bash -c "$SETUP"', "$SETUP", "quoting"),
    ("tpu_worker.sh", "[[ -z ${SETUP:-} ]] || bash", "[[ -z ${SETUP:-} ]] || ! bash", "setup_failed"),
]
SLURM = [
    ("75) failures=0", "74) failures=0", "saved"),
    ("0 | 64 | 65 | 70) rm", "0 | 64 | 65) rm", "stops"),
    ('echo "$code" >"$stop"', "true", "stops"),
    (">= MAX_FAILURES", "> MAX_FAILURES", "crashes"),
    ("== RUNNING ]]", "!= '' ]]", "cancelled"),
    ('--workdir="$WORKDIR" "$@"', '--workdir="$WORKDIR" $@', "success"),
    ("=1 --gpu-bind=none", "=1", "success"),
    ("--kill-on-bad-exit=1 ", "", "success"),
    (' --cpus-per-task="$SLURM_CPUS_PER_TASK"', "", "success"),
    ("--distributed ", "", "success"),
]
SBATCH = [
    ("--signal=TERM@300", "--signal=B:TERM@300"),
    ("--signal=TERM@300", "--signal=TERM@30"),
    ("--gpus-per-node=8", "--gpus-per-node=4"),
    ("--requeue", "--requeu"),
    ("--ntasks-per-node=8", "--ntask-per-node=8"),
    ("#SBATCH --nodes=2", "true\n#SBATCH --nodes=2"),
]
MANIFESTS = [
    (manifests.shell, "tpu_vm.sh", 'rm -rf "$archive"', "rm -rf $archive"),
    (manifests.shell, "slurm.sbatch", 'mkdir -p "$WORKDIR"', "mkdir -p $WORKDIR"),
    (manifests.jobset, "gke_jobset.yaml", "maxRestarts:", "maxRestart:"),
    (manifests.jobset, "gke_jobset.yaml", "maxRestarts: 100", "maxRestarts: many"),
    (manifests.jobset, "gke_jobset.yaml", "jobset.x-k8s.io/v1alpha2", "jobset.x-k8s.io/v1alpha1"),
    (manifests.jobset, "gke_jobset.yaml", "action: FailJobSet", "action: FailJob"),
    (manifests.jobset, "gke_jobset.yaml", "action: FailJob ", "action: FailJobSet "),
    (manifests.jobset, "gke_jobset.yaml", "replicas: 1", "replica: 1"),
    (manifests.jobset, "gke_jobset.yaml", "restartPolicy: Never", "restartPolicy: OnFailure"),
    (manifests.jobset, "gke_jobset.yaml", "nodeSelector:", "nodeSelectors:"),
    (manifests.jobset, "gke_jobset.yaml", "values: [64, 65, 70]", "values: [64, 65]"),
    (manifests.jobset, "gke_jobset.yaml", "parallelism: 4", "parallelism: 2"),
    (manifests.jobset, "gke_jobset.yaml", "containerPort: 8471", 'containerPort: "8471"'),
    (manifests.jobset, "gke_jobset.yaml", "backoffLimit: 0", "backoffLimit: 6"),
    (manifests.jobset, "gke_jobset.yaml", "mountPath: /data", "mountpath: /data"),
    (manifests.yaml_style, "gke_jobset.yaml", "spec:\n  ttl", "spec:\n   ttl"),
    (manifests.yaml_style, "gke_jobset.yaml", "    maxRestarts: 100", "    rules: []\n    maxRestarts: 100"),
    (manifests.sky, "sky_tpu.yaml", "accelerator_args", "accelerator_arg"),
    (manifests.sky, "sky_tpu.yaml", "use_spot: true", "use_spots: true"),
    (manifests.sky, "sky_tpu.yaml", "EAGER_NEXT_REGION", "EAGER"),
    (manifests.sky, "sky_tpu.yaml", "recover_on_exit_codes: [75]", "recover_on_exit_codes: [64, 75]"),
    (manifests.sky, "sky_tpu.yaml", "WORKDIR: null", "WORKDIRS: null"),
    (manifests.sky, "sky_gpu.yaml", "num_nodes: 2", "nodes: 2"),
    (manifests.sky, "sky_gpu.yaml", "num_nodes: 2", "num_nodes: two"),
    (manifests.sky, "sky_gpu.yaml", "mode: MOUNT", "mode: MOUNTED"),
    (manifests.sky, "sky_gpu.yaml", '"/runs/$RUN"', "/runs/$RUN"),
    (manifests.dockerfile, "Dockerfile", "WORKDIR /home", "WORKDIRS /home"),
    (manifests.dockerfile, "Dockerfile", "FROM python:3.12-slim-bookworm", "FROM python"),
    (manifests.dockerfile, "Dockerfile", "USER 1000", "USER root"),
    (manifests.dockerfile, "Dockerfile", " --no-cache-dir", ""),
    (manifests.image, "Dockerfile", "USER 1000\n", ""),
    (manifests.image, "Dockerfile", "COPY configs configs", "COPY config configs"),
    (manifests.image, "Dockerfile", " --constraint requirements.lock", ""),
    (manifests.image, "Dockerfile", "cmd_jax.main", "cmd_jax.train"),
    (manifests.image, "Dockerfile", "EXTRAS: gpu", "EXTRAS: cuda"),
]


def _mutated(directory, name, old, new):
    shutil.copytree(LAUNCH, directory)
    text = (directory / name).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
    (directory / name).write_text(text.replace(old, new))
    return directory / name


@pytest.mark.parametrize(("name", "old", "new", "scenario"), TPU)
def test_tpu_vm(name, old, new, scenario, tmp_path):
    _mutated(tmp_path / "launch", name, old, new)
    (tmp_path / "stage").mkdir()
    with pytest.raises(AssertionError):
        tpu_scenarios.SCENARIOS[scenario](Stage(tmp_path / "stage", tmp_path / "launch"))


@pytest.mark.parametrize(("old", "new", "scenario"), SLURM)
def test_slurm(old, new, scenario, tmp_path):
    script = _mutated(tmp_path / "launch", "slurm.sbatch", old, new)
    (tmp_path / "stage").mkdir()
    with pytest.raises(AssertionError):
        slurm_scenarios.SCENARIOS[scenario](script, tmp_path / "stage")


@pytest.mark.parametrize(("old", "new"), SBATCH)
def test_slurm_options(old, new, tmp_path):
    with pytest.raises((AssertionError, KeyError)):
        slurm_scenarios.submitted(_mutated(tmp_path / "launch", "slurm.sbatch", old, new))


@pytest.mark.parametrize(("check", "name", "old", "new"), MANIFESTS, ids=[f"{m[1]}-{m[2]}-{m[3]}" for m in MANIFESTS])
def test_manifest(check, name, old, new, tmp_path):
    path = _mutated(tmp_path / "launch", name, old, new)
    with pytest.raises(manifests.REFUSALS):
        check(path)

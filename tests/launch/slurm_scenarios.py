"""What slurm.sbatch must do, played by stand-ins for srun, squeue and scontrol; its options are read by a parser of ours."""

import os
import pathlib
import subprocess

SRUN = """#!/usr/bin/env bash
# srun TASKS: each in turn with its exit code from $FAKE/codes; ends with the highest one
echo "$@" >>"$FAKE/srun"
while [[ $1 == --* ]]; do shift; done
highest=0
for code in $(head -n 1 "$FAKE/codes"); do
  ended=0; FAKE_CODE=$code "$@" || ended=$?
  ((ended <= highest)) || highest=$ended
done
sed -i 1d "$FAKE/codes"
exit $highest
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$FAKE/words"; echo >>"$FAKE/words"
exit "$FAKE_CODE"
"""
SQUEUE = '#!/usr/bin/env bash\n[[ $* == "--noheader --jobs=7 --format=%T" ]] && cat "$FAKE/state"\n'
SCONTROL = '#!/usr/bin/env bash\necho "$@" >>"$FAKE/scontrol"\n'
OPTIONS = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "time",
    "signal",
    "requeue",
    "open-mode",
    "output",
}


def options(script: pathlib.Path) -> dict[str, str]:
    """The #SBATCH lines; sbatch reads them up to the first command."""
    found = {}
    for line in script.read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
    return found


def submitted(script: pathlib.Path) -> None:
    found = options(script)
    assert set(found) == OPTIONS
    assert found["ntasks-per-node"] == found["gpus-per-node"]  # one task a GPU
    name, seconds = found["signal"].split("@")
    assert (name, int(seconds) >= 120) == ("TERM", True)  # to the tasks (no B:), with time to save
    assert found["open-mode"] == "append"


def _play(script: pathlib.Path, root: pathlib.Path, codes: list[str], *words: str, state: str = "RUNNING") -> list[int]:
    """Exit codes of the job's starts, one for each element of codes, which holds those of the tasks."""
    (root / "bin").mkdir()
    for name, text in (("srun", SRUN), ("python", PYTHON), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    (root / "codes").write_text("\n".join(codes) + "\n")
    (root / "state").write_text(state + "\n")
    environ = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "FAKE": str(root), "SLURM_JOB_ID": "7"}
    environ["SLURM_CPUS_PER_TASK"] = "12"
    environ |= {"WORKDIR": str(root / "a run"), "PYTHON": "python", "MAX_FAILURES": "3"}
    return [subprocess.run(["bash", script, *words], env=environ, timeout=30, check=False).returncode for _ in codes]


def _requeued(root: pathlib.Path) -> list[str]:
    return (root / "scontrol").read_text().splitlines() if (root / "scontrol").exists() else []


def success(script: pathlib.Path, root: pathlib.Path) -> None:
    words = ["--config=configs/cub.py", "--config.data.folder=my $HOME 'photos'"]
    assert _play(script, root, ["0 0"], *words) == [0]
    started = (root / "words").read_text().split("\n")[:-1]
    assert len(started) == 2
    for line in started:
        assert line.split("\0")[:-1] == ["-m", "cmd_jax.main", "--distributed", f"--workdir={root / 'a run'}", *words]
    flags = (root / "srun").read_text().split()
    assert flags[:3] == ["--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=12"]
    assert _requeued(root) == []


def saved(script: pathlib.Path, root: pathlib.Path) -> None:
    assert _play(script, root, ["75 75"] * 4 + ["0 0"]) == [0] * 5
    assert _requeued(root) == ["requeue 7"] * 4


def stops(script: pathlib.Path, root: pathlib.Path) -> None:
    assert _play(script, root, ["64 64", "65 65", "70 70", "65 137"]) == [64, 65, 70, 65]
    assert _requeued(root) == []


def crashes(script: pathlib.Path, root: pathlib.Path) -> None:
    assert _play(script, root, ["1 137", "1 1", "75 75", "1 1", "1 1", "134 1"]) == [0, 0, 0, 0, 0, 134]
    assert _requeued(root) == ["requeue 7"] * 5


def cancelled(script: pathlib.Path, root: pathlib.Path) -> None:
    assert _play(script, root, ["75 75"], state="COMPLETING") == [75]
    assert _requeued(root) == []


SCENARIOS = {"success": success, "saved": saved, "stops": stops, "crashes": crashes, "cancelled": cancelled}

"""launch/slurm.sbatch against a fake Slurm."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"
FAKES = {
    # Runs the tasks in turn, with exit codes from a line of $FAKE/codes, and ends with the highest one.
    "srun": """echo "$@" >>"$FAKE/srun"
while [[ $1 == --* ]]; do shift; done
highest=0
for code in $(head -n 1 "$FAKE/codes"); do
  ended=0; FAKE_CODE=$code "$@" || ended=$?
  ((ended <= highest)) || highest=$ended
done
sed -i 1d "$FAKE/codes"
exit $highest""",
    "python": """printf '%s\\0' "$@" >>"$FAKE/words"; echo >>"$FAKE/words"; exit "$FAKE_CODE" """,
    "squeue": """[[ $* == "--noheader --jobs=7 --format=%T" ]] && cat "$FAKE/state" """,
    "scontrol": """echo "$@" >>"$FAKE/scontrol" """,
}


def _run(root: pathlib.Path, codes: list[str], *words: str, state: str = "RUNNING") -> tuple[list[int], int]:
    """Starts the job once for each line of the tasks' exit codes; returns the job's exit codes and the number of requeues."""
    (root / "bin").mkdir()
    for name, text in FAKES.items():
        (root / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (root / "bin" / name).chmod(0o755)
    (root / "codes").write_text("\n".join(codes) + "\n")
    (root / "state").write_text(state + "\n")
    (root / "scontrol").touch()
    environ = os.environ | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "FAKE": str(root), "WORKDIR": str(root / "a run")}
    environ |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12", "PYTHON": "python", "MAX_FAILURES": "3"}
    ended = [subprocess.run(["bash", SCRIPT, *words], env=environ, timeout=30, check=False).returncode for _ in codes]
    requeued = (root / "scontrol").read_text().splitlines()
    assert set(requeued) <= {"requeue 7"}
    return ended, len(requeued)


@pytest.mark.parametrize(
    ("codes", "state", "ended", "requeues"),
    [
        (["75 75"] * 4 + ["0 0"], "RUNNING", [0] * 5, 4),
        (["64 64", "65 65", "70 70", "65 137"], "RUNNING", [64, 65, 70, 65], 0),
        (["1 137", "1 1", "75 75", "1 1", "1 1", "134 1"], "RUNNING", [0, 0, 0, 0, 0, 134], 5),
        (["75 75"], "COMPLETING", [75], 0),
    ],
    ids=["saved", "stops", "gives up after three crashes", "cancelled"],
)
def test_requeues_by_exit_code(codes, state, ended, requeues, tmp_path):
    assert _run(tmp_path, codes, state=state) == (ended, requeues)


def test_arguments_arrive_as_given(tmp_path):
    words = ["--config=configs/cub.py", "--config.data.folder=my $HOME 'photos'"]
    assert _run(tmp_path, ["0 0"], *words) == ([0], 0)
    command = ["-m", "cmd_jax.main", "--distributed", f"--workdir={tmp_path / 'a run'}", *words]
    assert [line.split("\0")[:-1] for line in (tmp_path / "words").read_text().split("\n")[:-1]] == [command] * 2
    flags = (tmp_path / "srun").read_text().split()
    assert flags[:3] == ["--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=12"]


def test_sbatch_options():
    header = SCRIPT.read_text().split("\nset -")[0].splitlines()
    lines = [line.removeprefix("#SBATCH --").partition("=") for line in header if line.startswith("#SBATCH --")]
    options = {name: value for name, _, value in lines}
    sizes = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    assert set(options) == sizes | {"job-name", "signal", "requeue", "open-mode", "output"}
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one task a GPU
    assert options["signal"] == "TERM@300"  # to the tasks (no B:), with time to save
    assert options["open-mode"] == "append"
    assert all(line.startswith("#") for line in header)  # sbatch reads options up to the first command

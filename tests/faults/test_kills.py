"""Faults 1 and 2: a run that is killed and asked to stop at random moments ends as one that nobody touched, bit for bit."""

import random
import signal
import time

import pytest

from tests.conftest import made_once
from tests.faults.runs import TrainRun, assert_same_results, final_state, is_evaluating, is_saving, last_step

EPOCHS = 36
STEPS = 3 * EPOCHS  # 24 images, batches of 8
# In each phase, of two runs that are tested side by side: 12 kills and 6 SIGTERMs in all.
KILLS, TERMS = (2, 2), (1, 1)
PHASES = {"training": (last_step, 0.4), "saving": (is_saving, 0.08), "evaluation": (is_evaluating, 0.3)}


@pytest.fixture(scope="session")
def reference(programs, photo_folder, tmp_path_factory):
    """The work directory of a run that nobody touches, for both of those that are interrupted."""

    def train(path):
        whole = TrainRun(programs, path / "run", photo_folder, path, EPOCHS)
        assert whole.end() == 0, whole.output()

    return made_once(tmp_path_factory, "reference", train) / "run"


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(KILLS)))
def test_kills_and_sigterms_lose_nothing(number, reference, start, tmp_path, record_property):
    workdir = tmp_path / "run"
    rng, kills, terms = random.Random(number), KILLS[number], TERMS[number]
    plan = [(signal.SIGKILL, phase) for phase in PHASES for _ in range(kills)]
    plan += [(signal.SIGTERM, phase) for phase in PHASES for _ in range(terms)]
    rng.shuffle(plan)
    hit = dict.fromkeys(PHASES, 0)
    for sent, phase in plan:
        condition, longest_s = PHASES[phase]
        run = start(workdir, EPOCHS)
        assert run.wait_for(lambda run=run: "cache:" in run.output()), run.output()
        # The lines behind the newest checkpoint are gone by now: whatever comes next is new.
        seen = last_step(workdir)
        assert run.wait_for(lambda seen=seen: last_step(workdir) > seen), run.output()
        assert run.wait_for(lambda condition=condition: condition(workdir), every_s=0.002), run.output()
        time.sleep(rng.uniform(0, longest_s))
        hit[phase] += bool(condition(workdir))
        run.send(sent)
        code = run.end()
        if sent == signal.SIGKILL:
            assert code == -signal.SIGKILL, run.output()
        else:
            assert code == 75, run.output()
            (message,) = [line for line in run.output().splitlines() if line.startswith("preempted: ")]
            assert f"stopped as asked at step {final_state(workdir)[0]} of {STEPS}" in message

    last = start(workdir, EPOCHS)
    assert last.end() == 0, last.output()
    assert_same_results(workdir, reference, STEPS)
    again = start(workdir, EPOCHS)  # fault 10: a finished run is left as it is
    assert again.end() == 0, again.output()
    assert_same_results(workdir, reference, STEPS)
    assert hit["saving"], "no moment of saving was hit"
    assert hit["evaluation"], "no moment of an evaluation was hit"
    moments = ", ".join(f"{count} in {phase}" for phase, count in hit.items())
    record_property("kills", f"{kills * len(PHASES)}, SIGTERMs {terms * len(PHASES)} ({moments}): nothing lost")

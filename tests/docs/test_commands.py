"""Every command of README.md and docs/ runs, on data of a test's size, or says what it needs that is not here."""

import configparser
import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import QUICK_FLAGS
from tests.docs.commands import ROOT, Command, commands, commands_of
from tests.programs import Programs
from tests.test_cli import SMALL

COMMANDS = list(dict.fromkeys((command.words, command.needs) for command in commands()))
PROGRAMS = [words for words, needs in COMMANDS if "-m" in words and not needs]


def test_commands_are_found_and_a_need_is_only_what_the_list_allows():
    text = "    make demo  # sets up\n\n```sh\npython -m cmd_jax.main \\\n  --a=1  # needs a cloud\n```\n"
    text += "```python\npython = 1\n```\n"
    assert commands_of("x.md", text) == [
        Command("x.md", ("make", "demo"), ""),
        Command("x.md", ("python", "-m", "cmd_jax.main", "--a=1"), "needs a cloud"),
    ]
    assert commands_of("x.md", "    python -m x  # needs patience")[0].needs == ""
    assert len(PROGRAMS) > 10


def test_make_has_the_targets_and_setup_the_extras():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    targets = {word for words, _ in COMMANDS if words[0] == "make" for word in words[1:]}
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words, _ in COMMANDS:
        if words[0] == "pip":
            for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
                assert extra in setup["options.extras_require"], words


@pytest.mark.long
def test_every_program_runs(photo_folder, tmp_path):
    """In the order of the pages, so that what one command writes the next ones read."""
    photo = next((photo_folder / "test").rglob("*.png"))
    shutil.copy(photo, tmp_path / "PHOTO.jpg")
    shutil.copytree(photo_folder, tmp_path / "PHOTOS")  # some commands write into it
    os.symlink(ROOT / "configs", tmp_path / "configs")
    os.symlink(ROOT / "tests", tmp_path / "tests")
    given = []
    for words in sorted(PROGRAMS, key=_is_reader):
        arguments = list(words[words.index("-m") + 1 :])
        if arguments[0] == "cmd_jax.main" or arguments[:2] == ["cmd_jax.convert", "import"]:
            arguments += ["--config.data.source=folder", "--config.data.folder=PHOTOS", *SMALL[1:]]
            arguments += ["--config.model.name=vit_micro", "--config.eval.resize_px=18"]
            arguments += ["--config.views.local_count=0"]  # half of the time to trace and compile
            arguments += ["--config.eval.protocols=('knn',)"]  # all of them run in tests/evaluation
        given.append(arguments)
    with Programs(tmp_path, XLA_FLAGS=QUICK_FLAGS) as quick, Programs(tmp_path) as optimized:
        for arguments in given:
            # Golden numbers are those of the programs that users run.
            done = (optimized if arguments[0] == "tests.parity" else quick).run(*arguments)
            assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"


def _is_reader(words: tuple[str, ...]) -> bool:
    """Training goes first: README evaluates before a later page trains what it names."""
    return words[words.index("-m") + 1] != "cmd_jax.main"


@pytest.mark.parametrize("page", sorted({command.page for command in commands()}))
def test_a_program_that_is_named_exists(page):
    for command in commands():
        if command.page == page and "-m" in command.words:
            module = command.words[command.words.index("-m") + 1]
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command

"""Every command of README.md and docs/ parses; those that read a run do so, on one of a test's size."""

import configparser
import os
import re
import shutil
import subprocess

import pytest

from tests.docs.commands import ROOT, Command, commands, commands_of

COMMANDS = list(dict.fromkeys((command.words, command.needs) for command in commands()))
PROGRAMS = [words for words, needs in COMMANDS if "-m" in words and not needs]
READERS = {"cmd_jax.eval", "cmd_jax.embed", "cmd_jax.label", "cmd_jax.convert", "cmd_jax.report"}
ELSEWHERE = {("cmd_jax.eval", "--workdir"), ("cmd_jax.report", "--workdir")}  # tests/test_cli.py and tests/report run them
PARSED = READERS | {"cmd_jax.main", "cmd_jax.prepare", "tests.parity"}


def test_commands_and_known_needs_are_found():
    text = "    make demo  # sets up\n\n```sh\npython -m cmd_jax.main \\\n  --a=1  # needs a cloud\n```\n"
    text += "```python\npython = 1\n```\n"
    assert commands_of("x.md", text) == [
        Command("x.md", ("make", "demo"), ""),
        Command("x.md", ("python", "-m", "cmd_jax.main", "--a=1"), "needs a cloud"),
    ]
    assert commands_of("x.md", "    python -m x  # needs patience")[0].needs == ""
    assert len(PROGRAMS) > 10


def test_make_targets_and_extras_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    targets = {word for words, _ in COMMANDS if words[0] == "make" for word in words[1:]}
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words, _ in COMMANDS:
        if words[0] == "pip":
            for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
                assert extra in setup["options.extras_require"], words


def test_every_command_parses(programs, tmp_path):
    """Flags are known, their values are read, and the configuration is valid."""
    os.symlink(ROOT / "configs", tmp_path / "configs")
    given = [words[words.index("-m") + 1 :] for words, _ in COMMANDS if "-m" in words]
    given = [words for words in given if words[0] in PARSED]
    assert {words[0] for words in given} == PARSED
    for arguments in given:
        done = programs.run("tests.docs.parse", *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"


def _flags(words):
    """What tells commands apart, beside the values of their flags; of equal ones the first is run."""
    return tuple(word if word.startswith("--format") else word.split("=")[0] for word in words)


def test_commands_on_a_run_work(programs, finished, photo_folder, tmp_path):
    """Those that read a run, in the order of the pages, so that what one writes the next ones read.

    Training runs in tests/test_cli.py, and so do preparation, parity and import.
    """
    shutil.copy(next((photo_folder / "test").rglob("*.png")), tmp_path / "PHOTO.jpg")
    shutil.copytree(photo_folder, tmp_path / "PHOTOS")  # some commands write into it
    for name in ("photos", "photos_small"):
        shutil.copytree(finished[0], tmp_path / "runs" / name)
    given = [words[words.index("-m") + 1 :] for words in PROGRAMS]
    given = [words for words in given if words[0] in READERS and "--workdir=runs/demo" not in words]
    assert {words[0] for words in given} == READERS
    first = {}
    for words in given:
        first.setdefault(_flags(words), words)
    assert first.keys() >= ELSEWHERE
    for arguments in (words for flags, words in first.items() if flags not in ELSEWHERE):
        done = programs.run(*arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"


@pytest.mark.parametrize("page", sorted({command.page for command in commands()}))
def test_named_program_exists(page):
    for command in commands():
        if command.page == page and "-m" in command.words:
            module = command.words[command.words.index("-m") + 1]
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command

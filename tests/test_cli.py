"""Every command line entry point: help, a true run, and one clear line with the right exit code for a user's mistake."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.programs import FLAGS, ROOT

HEAVY = {"jax", "jaxlib", "flax", "numpy", "orbax", "PIL", "sklearn", "tensorflow"}
SMALL = (
    "--config=configs/folder.py:small",
    "--config.train.batch_size=8",
    "--config.train.epochs=1",
    "--config.optim.warmup_epochs=0",
    "--config.model.patch_size=8",
    "--config.views.global_px=16",
    "--config.views.local_px=8",
    "--config.head.prototypes=16",
    "--config.head.hidden_dim=16",
    "--config.data.canvas_px=32",
)


def _module(binary):
    return "tests.parity" if binary == "parity" else f"cmd_jax.{binary}"


def _start(binary, *arguments, flags=FLAGS):
    """In a process of its own, as a user does."""
    command = [sys.executable, *flags, "-m", _module(binary), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _imported(importtime):
    """Packages that a process has loaded, by what `-X importtime` says of it."""
    return {name.strip().split(".")[0] for name in re.findall(r"^import time:.*\|(.*)$", importtime, re.MULTILINE)}


@pytest.fixture
def run(programs):
    """Takes a binary's name and its arguments, starts no Python for them and compiles their programs quickly."""
    return lambda binary, *arguments: programs.run(_module(binary), *arguments)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("main", "--dry_run"),
        ("eval", "--step"),
        ("parity", "--only"),
        ("prepare", "--manual_dir"),
        ("convert", "--format"),
        ("convert import", "--config"),
        ("convert export", "--out"),
        ("report", "--out"),
        ("embed", "--query"),
        ("label", "--link"),
    ],
)
def test_help(command, flag):
    out = _start(*command.split(), "--help", flags=(*FLAGS, "-X", "importtime"))
    assert not HEAVY & _imported(out.stderr)
    assert out.returncode == 0, out.stderr
    text = out.stdout + out.stderr
    assert flag.strip("-") in text
    assert f"python -m {_module(command)} " in text
    assert "Exit codes" in text
    assert command != "main" or all(word in text for word in ("64", "65", "70", "75", "130", "--debug"))


@pytest.mark.parametrize("wrong", ["--config.optim.lr=nan", "--config.optim.lrr=1", "--wordkir=x"])
def test_wrong_flag_loads_no_jax(wrong):
    out = _start("main", "--config=configs/demo.py", "--dry_run", wrong, flags=(*FLAGS, "-X", "importtime"))
    assert out.returncode == 64
    assert "error: " in out.stderr
    assert "ml_collections" in _imported(out.stderr)
    assert not HEAVY & _imported(out.stderr)


@pytest.mark.long
def test_train_and_evaluate_a_folder(run, photo_folder, tmp_path):
    folder, workdir = f"--config.data.folder={photo_folder}", f"--workdir={tmp_path / 'run'}"
    less = ("--config.views.local_count=0", "--config.eval.protocols=knn,retrieval")  # the others run in tests/evaluation
    flags = (*SMALL, *less, folder, f"--compile_cache={tmp_path / 'programs'}")
    dry = _start("main", *flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "24 train, 12 test images" in dry.stdout
    (program,) = (tmp_path / "programs").glob("jit_train_step*-cache")
    trained = _start("main", *flags, workdir)
    assert trained.returncode == 0, trained.stderr
    assert list((tmp_path / "programs").glob("jit_train_step*-cache")) == [program]  # the dry run's
    assert list((tmp_path / "programs").glob("jit_encode_images*"))
    for words in ("teacher at the start (random weights):", "step 3/3", "k-NN top-1", "Retrieval Rank-1", "ETA", "images/s"):
        assert words in trained.stdout, words
    evaluated = run("eval", workdir)
    assert evaluated.returncode == 0, evaluated.stderr
    for words in ("start: random weights", "step 3", "12 test queries, 24 train images", "top-1 by class", "mil_overlays.png"):
        assert words in evaluated.stdout, words
    missing = run("eval", workdir, "--step=7")
    assert (missing.returncode, missing.stderr.count("\n")) == (65, 1)
    assert "has no step 7; it has 3" in missing.stderr


def test_weights_are_exported_and_imported(run, finished, tmp_path):
    out, workdir = f"--out={tmp_path / 'out'}", f"--workdir={tmp_path / 'run'}"
    exported = run("convert", "export", f"--workdir={finished[0]}", "--format=hf", "--network=student", "--step=3", out)
    assert exported.returncode == 0, exported.stderr
    lines = exported.stdout.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'out'}: student of step 3, 242,976 parameters"
    assert lines[1] == f"wrote {tmp_path / 'out' / 'README.md'}, its model card: fill in the licence"
    model = (*SMALL, "--config.data.folder=photos")
    imported = run("convert", "import", str(tmp_path / "out"), *model, workdir)
    assert imported.returncode == 0, imported.stderr
    for words in ("30 arrays of", "(Hugging Face ViT): backbone", "from the seed: image_head", f"wrote {tmp_path / 'run'}"):
        assert words in imported.stdout, words
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.json"]
    again = run("convert", "import", str(tmp_path / "out"), *model, workdir)
    assert (again.returncode, again.stderr.count("\n")) == (65, 1)
    unfit = run("convert", "import", str(tmp_path / "out"), *model, workdir + "2", "--config.model.name=vit_tiny")
    assert (unfit.returncode, unfit.stderr.count("\n")) == (64, 1)
    assert "model.name is 'vit_tiny', but" in unfit.stderr
    plain = run("convert", "import", str(tmp_path / "out"), workdir + "2")  # without a configuration
    assert plain.returncode == 0, plain.stderr
    assert "is ViT (transformers): ViT-micro/8, width 96, 2 blocks, 3 heads, table of 16 px" in plain.stdout
    bare = run("convert", "export", f"--workdir={finished[0]}")
    assert bare.returncode == 64
    assert "export needs --format=safetensors, stablehlo, onnx, timm or hf, and --out=PATH" in bare.stderr


def test_folder_is_embedded_and_searched(run, finished, photo_folder, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "features.parquet"
    shutil.copytree(photo_folder / "train", folder)
    (folder / "bad\x1b.png").write_bytes(b"")
    flags = (f"--checkpoint={finished[0]}", f"--out={out}", "--batch_size=8")
    made = run("embed", *flags, f"--images={folder}", "--patches")
    assert made.returncode == 0, made.stderr
    assert "25/25 images" in made.stdout
    assert made.stdout.endswith(
        f"wrote {out}: 24 images\n1 images could not be read and are left out; {out}.bad.txt lists them\n"
    )
    query = folder / "a class" / "3.png"
    found = run("embed", *flags, f"--query={query}", "--top=2", "--patches")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(rf"patch \([01], [01]\) of {re.escape(str(query))}", lines[0])
    assert re.fullmatch(r"   1   1\.0000  \([01], [01]\)  a class/3\.png", lines[1])
    out.write_bytes(out.read_bytes()[:-20])
    damaged = run("embed", *flags, f"--query={query}")
    assert (damaged.returncode, damaged.stderr.count("\n")) == (65, 1)
    assert f"{out} is damaged or no file of features" in damaged.stderr


def test_a_folder_is_labelled_round_by_round(run, finished, photo_folder, tmp_path):
    """The truth is the expert: a round to look, one with names for half, and links of what is then known."""
    folder, out, links = tmp_path / "photos", tmp_path / "labels", tmp_path / "links"
    shutil.copytree(photo_folder, folder)
    shutil.copy(folder / "train" / "a class" / "0.png", folder / "test" / "a class" / "copy.png")
    (folder / "test" / "b.class" / "bad.png").write_bytes(b"")
    flags = (f"--checkpoint={finished[0]}", f"--images={folder}", f"--out={out}", "--batch_size=8")
    done = run("label", *flags)
    assert done.returncode == 0, done.stderr
    assert "37 photographs, 1 cannot be read" in done.stdout
    assert "doubles: 1 exact, 0 near pairs; 1 across train and test" in done.stdout
    found = (out / "look.csv").read_text().splitlines()
    assert "exact double,train/a class/0.png,test/a class/copy.png,equal files; across train and test" in found
    kept = out / "thumbs.parquet"
    written = kept.stat().st_mtime_ns
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png") if path.name != "bad.png")
    names = {path: path.split("/")[1] for path in paths[::2]}
    first = "file,class\n" + "".join(f"{path},{name}\n" for path, name in names.items())
    (tmp_path / "first.csv").write_text(first)
    given = f"--labels={tmp_path / 'first.csv'}"
    done = run("label", *flags, given, f"--link={links}", "--threshold=0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first.csv").read_text() == first
    assert "is whole" not in done.stdout
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:-20])
    assert "beside the class folders of 18 images without a label: " in done.stdout
    suggested = (out / "suggestions.csv").read_text().splitlines()
    assert suggested[0] == "file,class,probability,unknown,nearest"
    assert [line.split(",")[0] for line in suggested[1:]] == paths[1::2]
    linked = [path for path in links.rglob("*") if path.is_symlink()]
    assert len(linked) == 37
    assert {os.path.relpath(os.path.realpath(path), folder): path.parent.name for path in linked}.items() >= {
        (path, name.replace("<", "%3C").replace(">", "%3E")) for path, name in names.items()
    }
    (tmp_path / "second.csv").write_text(f"file,class,state\n{paths[0]},Owl,named\n{paths[1]},,struck\n")
    done = run("label", *flags, f"--labels={tmp_path / 'second.csv'}")
    assert done.returncode == 0, done.stderr
    assert f"  {paths[0]}: {names[paths[0]]}, then Owl" in done.stdout
    assert f"{kept} is damaged; the photographs are read again" in done.stdout
    history = (out / "history.csv").read_text().splitlines()
    assert len(history) == 1 + len(names) + 2
    assert "19 images of 4 classes are labelled, 1 are struck" in done.stdout
    refused = run("label", *flags, f"--link={folder / 'links'}")
    assert (refused.returncode, refused.stderr.count("\n")) == (64, 1)
    assert "whose images its links would become" in refused.stderr


@pytest.mark.parametrize(
    ("binary", "arguments", "message"),
    [
        ("main", (), "--config is missing"),
        ("main", ("--config=configs/demo.py",), "--workdir is missing"),
        ("main", ("--config=configs/none.py", "--workdir=x"), "configs/none.py"),
        ("main", ("--config=configs/demo.py:typo", "--workdir=x"), "unknown preset 'typo'"),
        ("main", ("--config=configs/demo.py", "--workdir=x", "--config.optim.lrr=1"), 'Did you mean "lr"'),
        ("main", ("--config=configs/demo.py", "--workdir=x", "--config.train.batch_size=many"), "many"),
        (
            "main",
            ("--config=configs/demo.py", "--workdir=x", "--config.method.name=moco"),
            "method.name is 'moco'; it must be one of",
        ),
        ("main", ("--config=configs/demo.py", "--wordkir=x"), "wordkir"),
        ("main", ("--config=configs/demo.py", "--workdir=x", "word"), "unexpected argument 'word'"),
        ("main", ("--config=configs/folder.py", "--workdir=x"), "needs data.folder"),
        (
            "main",
            ("--config=configs/folder.py", "--config.data.folder=/no/place", "--workdir=x"),
            "'/no/place' is not a directory",
        ),
        ("parity", (), "--fixtures is missing"),
        ("parity", ("--fixtures=/no/place",), "--fixtures=/no/place is not a directory"),
        ("prepare", (), "no dataset; use python -m cmd_jax.prepare NAME with one of synthetic_birds, cub, cars"),
        ("prepare", ("cubs",), "there is no dataset 'cubs'; use one of synthetic_birds, cub"),
        ("prepare", ("cub", "cars"), "unexpected argument 'cars'"),
        ("prepare", ("folder",), "--folder=DIR belongs to python -m cmd_jax.prepare folder; pass both or neither"),
        ("prepare", ("cub", "--folder=x"), "--folder=DIR belongs to python -m cmd_jax.prepare folder"),
        ("eval", (), "--workdir is missing"),
        ("eval", ("--workdir=/no/run",), "/no/run has no config.json"),
        ("eval", ("--workdir=x", "--step=many"), "step"),
        ("report", (), "--workdir is missing"),
        ("report", ("--workdir=/no/run",), "/no/run has no config.json"),
        ("convert", (), "no command; use import SOURCE or export"),
        ("convert", ("transmute", "--workdir=x"), "unknown command 'transmute'; use import SOURCE or export"),
        ("convert", ("import", "a.pth", "--config=configs/cub.py"), "--workdir is missing"),
        ("convert", ("import", "--workdir=x"), "import needs a source"),
        ("convert", ("import", "a.pth", "--workdir=x", "--config=a.py"), "--config=a.py does not exist"),
        ("convert", ("import", "a.pth", "b.pth", "--workdir=x"), "unexpected argument 'b.pth'"),
        ("convert", ("export", "--workdir=/no/run"), "/no/run has no config.json"),
        ("convert", ("export", "word", "--workdir=x"), "unexpected argument 'word'; export reads --workdir"),
        ("convert", ("export", "--workdir=x", "--format=tflite"), "format"),
        ("embed", (), "--checkpoint is missing"),
        ("embed", ("--checkpoint=x", "--out=a.npz"), "--images=DIR is missing"),
        ("embed", ("--checkpoint=x", "--out=a.npz", "--sheet=a.png", "--images=x"), "--sheet draws what --query finds"),
        ("label", ("--checkpoint=x", "--images=y"), "--out is missing"),
        ("command", (), "no command; use train, eval, embed, label, convert, prepare, report"),
        ("command", ("tarin",), "unknown command 'tarin'; use train, eval, embed"),
        ("command", ("embed", "--checkpoint=x"), "--out is missing"),
    ],
)
def test_mistake_gets_one_line_and_code_64(run, binary, arguments, message):
    out = run(binary, *arguments)
    assert out.returncode == 64, out.stderr
    assert message in out.stderr
    assert out.stderr.startswith("error: ")
    assert "Traceback" not in out.stderr
    assert not (ROOT / "x").exists()


def test_prepare_describes_and_verifies(run, tmp_path):
    data = f"--data_dir={tmp_path / 'data'}"
    missing = run("prepare", "nabirds", data)
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (65, "", 1)
    assert f"{tmp_path / 'data' / 'downloads' / 'manual'} lacks nabirds.tar.gz from https://dl.allaboutbirds" in missing.stderr
    (tmp_path / "nabirds.tar.gz").write_bytes(b"<html>404</html>")
    damaged = run("prepare", "nabirds", data, f"--manual_dir={tmp_path}")
    assert (damaged.returncode, damaged.stderr.count("\n")) == (65, 1)
    assert "nabirds.tar.gz has md5 " in damaged.stderr


def test_prepare_verifies_a_folder(run, photo_folder, tmp_path):
    folder = shutil.copytree(photo_folder, tmp_path / "photos")
    assert run("prepare", "folder", f"--folder={folder}").returncode == 0
    verified = run("prepare", "folder", f"--folder={folder}", "--verify")
    assert verified.returncode == 0, verified.stderr
    assert "24 train, 12 test images, 3 classes" in verified.stdout
    assert "all files and images are right" in verified.stdout
    path = folder / "test" / "a class" / "0.png"
    path.write_bytes(path.read_bytes() + b" ")  # decodes as before
    changed = run("prepare", "folder", f"--folder={folder}", "--verify")
    assert (changed.returncode, changed.stderr.count("\n")) == (65, 1)
    assert "1 of 36 files are not what manifest.sha256 says, first test/a class/0.png (has changed)" in changed.stderr


def test_impossible_workdir_is_refused_first(run, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir, place in ((tmp_path / "file", "file"), (tmp_path / "file" / "run", "file")):
        out = run("main", "--config=configs/demo.py:smoke", f"--config.data.data_dir={tmp_path}", f"--workdir={workdir}")
        expected = f"error: --workdir={workdir} cannot be a directory, {tmp_path / place} is a file; choose another\n"
        assert (out.returncode, out.stdout, out.stderr) == (64, "", expected)
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(preset=''):\n  return nothing", "NameError: name 'nothing' is not defined ({path}, line 2)"),
        ("def get_config(preset='')\n  return 1", "SyntaxError: expected ':' ("),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name' ({path}, line 1)"),
        ("def get_config(preset=''):\n  return dict(seed=0)", "get_config returned a dict; return cmd_jax.config.default()"),
        ("seed = 0", "has no attribute 'get_config'"),
        (
            "from cmd_jax.config import default\ndef get_config(preset=''):\n  c = default(); c.optim.lrr = 1.0; return c",
            "unknown config key optim.lrr; did you mean optim.lr?",
        ),
        (
            "from cmd_jax.config import default\ndef get_config(preset=''):\n  c = default(); c.train.epochs = 'ten'; return c",
            "is of original type <class 'str'> and cannot be casted to type <class 'float'>",
        ),
    ],
)
def test_mistake_in_a_config_file_is_one_line(run, tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    out = run("main", f"--config={path}", "--dry_run")
    assert (out.returncode, out.stderr.count("\n")) == (64, 1), out.stderr
    assert message.format(path=path) in out.stderr


@pytest.mark.parametrize(
    ("binary", "arguments", "code"),
    [
        ("main", ("--config=configs/demo.py", "--config.optim.lr=nan", "--dry_run"), 64),
        ("main", ("--config=configs/demo.py", "--config.optim.lrr=1"), 64),  # found while the flags are parsed
        ("prepare", ("cubs",), 64),
    ],
)
def test_debug_shows_the_traceback_first(run, binary, arguments, code):
    out = run(binary, *arguments, "--debug")
    assert out.returncode == code
    assert out.stderr.startswith("Traceback (most recent call last)")
    assert out.stderr.splitlines()[-1].startswith("error: ")


ERRORS_PROGRAM = """
import errno, os, sys
import jax
from cmd_jax import cli
from cmd_jax.errors import (
    BadImage, CheckpointError, Collapsed, ConfigError, DatasetError, NoLabels, NonFinite, WeightsError,
)

system = lambda number, *path: OSError(number, os.strerror(number), *path)
errors = [
    *(kind("no") for kind in (ConfigError, NoLabels, BadImage, DatasetError, CheckpointError, WeightsError)),
    NonFinite("no"), Collapsed("no"), KeyboardInterrupt(),
    system(errno.EACCES, "/a/b"), system(errno.EROFS, "/a/b"), system(errno.ENOTDIR, "/a/b"), system(errno.ENOENT, "/a/b"),
    system(errno.ENOSPC, "/tmp/no/b"), system(errno.ENOSPC),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."), MemoryError("8.00 GiB"),
    jax.errors.JaxRuntimeError("INTERNAL: the device is gone"), system(errno.EIO, "/a/b"), system(errno.ENOENT),
    ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("a bug"),
]

def main():
    raise error

for error in errors:
    sys.stderr.flush()
    try:
        cli.run(main, "usage")
    except SystemExit as stopped:
        print("code", stopped.code, file=sys.stderr)
    except BaseException as other:
        print("raised", type(other).__name__, file=sys.stderr)
"""


def test_each_error_has_its_exit_code():
    out = subprocess.run([sys.executable, "-c", ERRORS_PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in out.stderr
    lines = out.stderr.splitlines()
    ends = [line for line in lines if line.startswith(("code", "raised"))]
    assert ends[:9] == ["code 64"] * 2 + ["code 65"] * 4 + ["code 70"] * 2 + ["code 130"]
    assert ends[9:17] == ["code 64"] * 4 + ["code 65"] * 2 + ["code 64"] * 2
    assert ends[17:] == [f"raised {name}" for name in ("JaxRuntimeError", "OSError", "FileNotFoundError")] + [
        "raised ConnectionResetError",
        "raised ValueError",
    ]
    messages = [line for line in lines if not line.startswith(("code", "raised"))]
    assert len(messages) == 17  # one line each
    assert messages[8] == "interrupted"
    assert messages[9] == "error: /a/b: Permission denied; allow it, or choose another path"
    assert re.fullmatch(
        r"error: /tmp/no/b: No space left on device, [\d.]+ GiB are free; make room and run again", messages[13]
    )
    assert messages[15].startswith(
        "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.); raise"
    )
    assert "train.batch_size" in messages[16]


def test_interrupt_ends_with_one_line():
    program = (
        "import signal\nfrom cmd_jax import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # processes in the background begin without it
        "def main():\n  print('working', flush=True)\n  signal.raise_signal(signal.SIGINT)\n  print('not reached')\n"
        "cli.run(main, 'usage')"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout, out.stderr) == (130, "working\n", "interrupted\n")


def test_evaluation_refuses_a_damaged_config_json(run, tmp_path):
    for text, message in (
        ("{", "is not JSON"),
        ('{"eval": {"batch_size": "many"}}', "eval.batch_size is 'many'; it must be a"),
    ):
        (tmp_path / "config.json").write_text(text)
        out = run("eval", f"--workdir={tmp_path}")
        assert (out.returncode, out.stderr.count("\n")) == (64, 1), out.stderr
        assert message in out.stderr


def test_parity_ends_with_1_on_mismatch(run, tmp_path):
    fixtures = ROOT / "tests" / "fixtures"
    good = run("parity", f"--fixtures={fixtures}", "--only=schedules", "--verbose")
    assert good.returncode == 0, good.stderr
    lines = good.stdout.splitlines()
    assert (lines[0].split()[0], lines[0].split()[-1]) == ("schedules", "ok")
    assert "out_a_lr" in lines[1]
    with np.load(fixtures / "schedules.npz") as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(tmp_path / "schedules.npz", **(arrays | {"out_a_lr": arrays["out_a_lr"] + 1e-6}))
    (tmp_path / "MANIFEST.md").write_text("`schedules.npz` and `knn.npz`")
    bad = run("parity", f"--fixtures={tmp_path}")
    assert bad.returncode == 1
    assert [line.split()[0::3] for line in bad.stdout.splitlines()] == [["knn", "MISSING"], ["schedules", "FAIL"]]
    assert "schedules: out_a_lr is off by" in bad.stderr

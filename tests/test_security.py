"""What the package must never do, looked for in its source; and names of data on their way to terminals and pictures."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cmd_jax.errors import WeightsError
from cmd_jax.weights.read import read_source
from tests.parity.check import check_fixture

ROOT = Path(__file__).parent.parent
CHILD = "cmd_jax/weights/pickled_child.py"  # the one process that reads pickles, with PyTorch's restricted unpickler
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "shutil.unpack_archive"}
METHODS = {"extractall", "extract", "loads_pickle"}


def _faults(source, path):
    """Lines that unpickle, run text as a program, start a shell, or unpack archives onto the disk."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in MODULES for name in names) and path != CHILD:
            found.append((node.lineno, f"import {names}"))
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
            found.append((node.lineno, called))
        if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
            found.append((node.lineno, "np.load that may unpickle"))
        if called == "torch.load" and (path != CHILD or options.get("weights_only") != "True"):
            found.append((node.lineno, "torch.load that may run a program"))
        if called.startswith("subprocess.") and options.get("shell", "False") != "False":
            found.append((node.lineno, "a shell"))
    return found


def test_nothing_is_unpickled_run_or_unpacked():
    paths = sorted((ROOT / "cmd_jax").rglob("*.py"))
    assert len(paths) > 80
    found = {name: _faults(path.read_text(), name) for path in paths if (name := str(path.relative_to(ROOT)))}
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import yaml",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "exec(text)",
        "tar.extractall(path)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_search_finds_every_fault(line):
    assert _faults(line, "cmd_jax/other.py")
    assert bool(_faults(line, CHILD)) == (
        line not in ("import pickle", "from dill import loads", "import yaml", "torch.load(path, weights_only=True)")
    )


def test_arrays_of_objects_are_refused(tmp_path):
    """Those are pickles inside a file of arrays."""
    trace = tmp_path / "trace"

    class Runs:
        def __reduce__(self):
            return Path.touch, (trace,)

    np.savez(tmp_path / "schedules.npz", lr=np.array([Runs()], dtype=object))
    outcome = check_fixture(str(tmp_path), "schedules")
    assert outcome.status == "FAIL"
    assert "Object arrays cannot be loaded when allow_pickle=False" in outcome.notes[0]
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "owner",
        "owner/..",
        "../name",
        "owner/name/more",
        "owner/name@../../x",
        "owner/name@",
        "/etc/x",
        "a/b@/x",
        "a/\x1b[31m",
        "ä/b",
    ],
)
def test_hub_name_cannot_leave_the_cache(name, monkeypatch):
    hub = SimpleNamespace(hf_hub_download=lambda *arguments, **options: pytest.fail(f"asked for {arguments}, {options}"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(WeightsError, match="names no model; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION"):
        read_source(f"hf:{name}", "teacher")


def test_error_cannot_command_the_terminal():
    program = (
        "from cmd_jax import cli; from cmd_jax.errors import DatasetError\n"
        "def main(): raise DatasetError('photos/\\x1b[2J\\u202egpj.exe is bad')\n"
        "cli.run(main, 'usage')"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (65, "error: photos/\\x1b[2J\\u202egpj.exe is bad\n")

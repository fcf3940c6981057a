"""Checks a directory of golden numbers file by file; what `tests.parity` prints."""

import os
import re
from typing import NamedTuple

import jax
from flax.errors import FlaxError

from cmd_jax.errors import ConfigError, WeightsError
from tests.parity.backbones import check_head, check_swin, check_vit
from tests.parity.fixture import WEIGHTS_SUFFIX, Comparison, Fixture, MissingArray
from tests.parity.losses import check_dino, check_esvit, check_paper, check_released
from tests.parity.recipe import check_optimizer, check_protocols, check_schedules

# A file belongs to the checker whose key is its name, or its name up to an underscore: swin_w7 and swin_w14 to "swin".
CHECKERS = {
    "vit": check_vit,
    "swin": check_swin,
    "dino_head": check_head,
    "dino_loss": check_dino,
    "esvit_loss": check_esvit,
    "cmd_released_loss": check_released,
    "cmd_paper_loss": check_paper,
    "schedules": check_schedules,
    "optimizer": check_optimizer,
    "knn": check_protocols,
}
EXPECTED = (*(set(CHECKERS) - {"swin"}), "swin_w7", "swin_w14")
MANIFEST = "MANIFEST.md"


class Outcome(NamedTuple):
    """What became of one fixture.

    Attributes:
        name: of the fixture.
        status: "ok", "FAIL" or "MISSING".
        comparisons: one for each expected array (two where parts of it have other tolerances).
        notes: why it is not ok, a sentence each.
    """

    name: str
    status: str
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """`name max_error tolerance status`: error and tolerance of the array that comes closest to its limit, or passes it."""
        if not self.comparisons:
            return f"{self.name:20} {'-':>9} {'-':>7} {self.status}"
        worst = max(self.comparisons, key=lambda comparison: comparison.ratio)
        return f"{self.name:20} {worst.error:9.2e} {worst.tolerance.limit:7.0e} {self.status}"

    def details(self) -> str:
        """A line for every expected array."""
        rows = (
            f"  {c.array:52} {c.error:9.2e} {c.tolerance.limit:7.0e} {c.tolerance.measure:11} {'ok' if c.passed else 'FAIL'}"
            for c in self.comparisons
        )
        return "\n".join(rows)


def fixture_names(directory: str) -> list[str]:
    """Names of the fixtures that a directory has or should have, sorted.

    Those that it has a file of, and those that its MANIFEST.md names, without one every known fixture.

    Raises:
        ConfigError: there is no such directory.
    """
    if not os.path.isdir(directory):
        raise ConfigError(f"--fixtures={directory} is not a directory; give one with .npz files of golden numbers")
    files = os.listdir(directory)
    names = {file.removesuffix(ending) for file in files for ending in (".npz", WEIGHTS_SUFFIX) if file.endswith(ending)}
    listed = set()
    if MANIFEST in files:
        with open(os.path.join(directory, MANIFEST), encoding="utf-8") as file:
            listed = set(re.findall(r"`(\w+)\.npz`", file.read()))
    return sorted(names | (listed or set(EXPECTED)))


def check_fixture(directory: str, name: str) -> Outcome:
    """Runs one fixture through the project's code.

    Args:
        directory: of the fixtures.
        name: of the fixture.
    """
    fitting = [key for key in CHECKERS if name == key or name.startswith(f"{key}_")]
    if not fitting:
        return Outcome(name, "FAIL", notes=(f"no checker has this name; there are {', '.join(CHECKERS)}",))
    path = os.path.join(directory, f"{name}.npz")
    if not os.path.exists(path):
        return Outcome(name, "MISSING", notes=(f"{name}.npz is not there",))
    try:
        fixture = Fixture(path)
    # zipfile and NumPy raise many types on damaged files; all of them mean the same here.
    except Exception as error:
        return Outcome(name, "FAIL", notes=(f"{name}.npz cannot be read: {error}",))
    missing, faults = [], []
    try:
        # On a TPU or GPU the default rounds products to fewer digits than the tolerances have.
        with jax.default_matmul_precision("highest"):
            CHECKERS[max(fitting, key=len)](fixture)
    except MissingArray as error:
        missing.append(str(error.args[0]))
    except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError, FlaxError, WeightsError) as error:
        faults.append(f"stopped: {type(error).__name__}: {error}")
    missing += fixture.missing
    faults += [f"{c.array} is off by {c.error:.3g}, {c.tolerance.measure}" for c in fixture.comparisons if not c.passed]
    if not missing and not faults:
        faults += [f"{array} was compared with nothing" for array in fixture.unchecked()]
    status = "FAIL" if faults else "MISSING" if missing else "ok"
    notes = (*faults, *(f"{array} is missing" for array in missing))
    return Outcome(name, status, tuple(fixture.comparisons), notes)

"""Parity binary: `python -m tests.parity --fixtures=DIR`."""

import sys

from absl import flags

from cmd_jax import cli
from cmd_jax.errors import ConfigError

USAGE = """Checks the project against golden numbers of the reference implementations.

  python -m tests.parity --fixtures=tests/fixtures
  python -m tests.parity --fixtures=tests/fixtures --only=vit --verbose

Prints one line for each fixture, `name max_error tolerance ok|FAIL|MISSING`, with the error of the array that comes closest
to its tolerance, in that tolerance's measure (--verbose lists every array); reasons go to the standard error. Expected are
the fixtures that DIR/MANIFEST.md names, without one every known fixture.
Exit codes: 0 all ok, 1 something is FAIL or MISSING, 64 bad flag."""

_FIXTURES = flags.DEFINE_string("fixtures", None, "directory of NAME.npz and NAME_weights.safetensors")
_ONLY = flags.DEFINE_string("only", None, "check this fixture alone")
_VERBOSE = flags.DEFINE_bool("verbose", False, "list every array with its error, tolerance and measure")


def main() -> None:
    if _FIXTURES.value is None:
        raise ConfigError("--fixtures is missing; pass a directory of golden numbers such as --fixtures=tests/fixtures")
    cli.start_jax()
    from tests.parity import check

    names = check.fixture_names(_FIXTURES.value)
    good = True
    for name in [_ONLY.value] if _ONLY.value else names:
        outcome = check.check_fixture(_FIXTURES.value, name)
        good &= outcome.status == "ok"
        print(outcome.line(), flush=True)
        if _VERBOSE.value and outcome.comparisons:
            print(outcome.details(), flush=True)
        for note in outcome.notes:
            print(f"  {name}: {note}", file=sys.stderr, flush=True)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, USAGE)

"""The console script `cmd-jax`: `cmd-jax embed --checkpoint=...` is `python -m cmd_jax.embed --checkpoint=...`."""

import runpy
import sys

MODULES = {
    "train": ("cmd_jax.main", "trains on images"),
    "eval": ("cmd_jax.eval", "evaluates the teacher of a run"),
    "embed": ("cmd_jax.embed", "writes the features of a folder, and searches in them"),
    "label": ("cmd_jax.label", "from photographs to labels: looks, groups, a page for the expert, fills in"),
    "convert": ("cmd_jax.convert", "weights of other projects in, and ours out"),
    "prepare": ("cmd_jax.prepare", "makes a dataset ready on disk"),
    "report": ("cmd_jax.report", "the page of a run, or of several"),
}
USAGE = "usage: cmd-jax COMMAND [--FLAG=VALUE ...]; cmd-jax COMMAND --help shows its flags\n\n" + "".join(
    f"  {name:8} {what} (python -m {module})\n" for name, (module, what) in MODULES.items()
)


def main() -> None:
    """Runs the module of a command with the rest of the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("help", "--help", "-h", "-help", "--helpfull"):
        print(USAGE, end="")
        return
    if name not in MODULES:
        print(f"error: {'unknown command ' + ascii(name) if name else 'no command'}; use {', '.join(MODULES)}", file=sys.stderr)
        sys.exit(64)
    module = MODULES[name][0]
    del sys.argv[1]
    sys.argv[0] = f"cmd-jax {name}"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

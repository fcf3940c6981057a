"""docs/configs.md from `cmd_jax.config.KEYS`: every key, its default, what it may be and what it means.

python -m tests.docs.config_table > docs/configs.md
"""

from cmd_jax.config import KEYS
from cmd_jax.config.keys import SECTIONS, Key

HEAD = """# The configuration

A file in `configs/` builds the configuration, `--config=FILE:PRESET` chooses it, and `--config.SECTION.KEY=VALUE` sets a value:

    python -m cmd_jax.main --config=configs/cub.py:dino --config.train.batch_size=128 --workdir=runs/cub_dino

Keys whose default is empty are filled from the method, the number of training images and the hardware (`resolve` in
`cmd_jax/config/resolve.py`), where the last column does not say what empty (None) means; few images are fewer than 20,000.
`config.json` in the work directory holds every value that was used. A value that cannot work is refused before anything is
read or written, with the rule and a remedy, and so is an unknown key. `--dry_run` shows what a configuration means: data,
shapes, memory and arithmetic.

Several values are separated by commas, `--config.eval.protocols=knn,retrieval` or `--config.views.global_scale=0.4,1`; Python's
`"('knn', 'retrieval')"` is read too. Of a flag that is given twice the later one counts.

A configuration of your own is a Python file with a function `get_config()` that returns `cmd_jax.config.default()`, changed;
the files in `configs/` are examples. This page is written from the table in `cmd_jax/config/keys.py`.
"""
TABLE = ["", "| key | default | may be | meaning |", "|---|---|---|---|"]


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip(), *TABLE, *(_row(key, entry) for key, entry in KEYS.items() if "." not in key)]
    for section, meaning in SECTIONS.items():
        rows = [_row(key, entry) for key, entry in KEYS.items() if key.startswith(f"{section}.")]
        lines += ["", f"## {section}", "", meaning, *TABLE, *rows]
    return "\n".join(lines) + "\n"


def _row(key: str, entry: Key) -> str:
    usual = "" if entry.default is None else f"`{entry.default!r}`"
    meaning = entry.meaning.replace("|", r"\|")
    return f"| `{key}` | {usual} | {entry.rule.allowed} | {meaning} |"


if __name__ == "__main__":
    print(page(), end="")

#!/usr/bin/env -S python3 -IS
"""Python and uv of a worker: `uv venv` puts it where the environment belongs, `-m cmd_jax.main` ends as $FAKE_CODE says."""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

HOME = pathlib.Path.home()


def main(words: list[str]) -> int:
    with open(HOME / "calls.jsonl", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(words) + "\n")
    if words[0] == "venv":
        if "--clear" in words:
            shutil.rmtree(words[-1], ignore_errors=True)
        (pathlib.Path(words[-1]) / "bin").mkdir(parents=True)
        shutil.copy(__file__, pathlib.Path(words[-1]) / "bin" / "python")
    if words[:2] == ["-m", "cmd_jax.main"] and os.environ["FAKE_HANG"] == "1":
        signal.signal(signal.SIGTERM, lambda *_: (HOME / "saved").touch() or sys.exit(75))
        (HOME / "training").touch()
        time.sleep(20)
    return int(os.environ["FAKE_CODE"]) if words[:2] == ["-m", "cmd_jax.main"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

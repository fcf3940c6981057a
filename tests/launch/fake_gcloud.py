#!/usr/bin/env -S python3 -IS
"""A stand-in for gcloud with one queued resource of two workers, and for uv and python on those workers.

$FAKE/script.json says what happens; each call takes the first element of a list:
  states, node  what exists now; of several states each look at the resource shows the next one, and the last one stays
  creations     the states that a created resource goes through
  runs          a training: {"codes": exit code of each worker, "state" and "node" afterwards, "hang": run until SIGTERM,
                "lost": the connection drops, so that gcloud repeats the command while the first training still runs}
  refusals      names of commands that fail once
Calls are appended to $FAKE/calls.jsonl. A worker is a directory with its own home, in which bash runs the remote commands.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

FAKE = pathlib.Path(os.environ["FAKE"])
WORKERS = [FAKE / "worker0", FAKE / "worker1"]


def gcloud(words: list[str]) -> int:
    record(FAKE, words)
    script = json.loads((FAKE / "script.json").read_text())
    group, verb = words[2], words[3]
    if verb in script["refusals"]:
        script["refusals"].remove(verb)
        save(script)
        return refuse("UNAVAILABLE")
    states = script["states"]
    if verb == "list":
        shown = (states[:1] or [""])[0] if group == "queued-resources" else script["node"]
        if group == "queued-resources" and len(states) > 1:
            states.pop(0)
            save(script)
        print(shown or "", end="\n" if shown else "")
        return 0
    if verb == "create":
        if states:
            return refuse("ALREADY_EXISTS")
        subprocess.run(["rm", "-rf", *WORKERS], check=True)
        for worker in WORKERS:
            worker.mkdir()
        save(script | {"states": script["creations"].pop(0) if script["creations"] else ["ACTIVE"], "node": "READY"})
        return 0
    if verb == "delete":
        if not states:
            return refuse("NOT_FOUND")
        save(script | {"states": [], "node": None})
        return 0
    if states[:1] != ["ACTIVE"] or script["node"] != "READY":
        return refuse("the node is not READY")
    workers = WORKERS if "--worker=all" in words else WORKERS[:1]
    if verb == "scp":
        for worker in workers:
            (worker / words[5].split(":")[1]).write_bytes(pathlib.Path(words[4]).read_bytes())
        return 0
    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    return ssh(script, workers, command)


def ssh(script: dict, workers: list[pathlib.Path], command: str) -> int:
    run = {}
    if " train " in command:
        run = script["runs"].pop(0)
        save(script)
    codes = {}

    def on(worker: pathlib.Path) -> None:
        environ = {**os.environ, "HOME": str(worker), "PATH": f"{FAKE / 'worker-bin'}:{os.environ['PATH']}"}
        environ |= {"FAKE_CODE": str(run["codes"][WORKERS.index(worker)] if run else 0), "FAKE_HANG": str(run.get("hang", ""))}
        if run.get("lost"):
            subprocess.Popen(["bash", "-c", command], cwd=worker, env=environ | {"FAKE_HANG": "1"})
            while not (worker / "training").exists():
                time.sleep(0.02)
        codes[worker] = subprocess.run(["bash", "-c", command], cwd=worker, env=environ, check=False).returncode

    threads = [threading.Thread(target=on, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    script = json.loads((FAKE / "script.json").read_text())  # other calls may have changed it meanwhile
    if run and script["states"]:
        save(script | {"states": [run.get("state", "ACTIVE")], "node": run.get("node", "READY")})
    return next((codes[worker] for worker in workers if codes[worker]), 0)


def on_worker(words: list[str]) -> int:
    """`uv venv` installs this file as the environment's python; `python -m cmd_jax.main` ends with $FAKE_CODE."""
    home = pathlib.Path.home()
    record(home, words)
    if words[0] == "venv":
        (pathlib.Path(words[-1]) / "bin").mkdir(parents=True, exist_ok=True)
        python = pathlib.Path(words[-1]) / "bin" / "python"
        python.write_bytes(pathlib.Path(__file__).read_bytes())
        python.chmod(0o755)
    if words[:2] != ["-m", "cmd_jax.main"]:
        return 0
    if os.environ["FAKE_HANG"]:
        signal.signal(signal.SIGTERM, lambda *_: (home / "saved").touch() or sys.exit(75))
        (home / "training").touch()
        time.sleep(20)
    return int(os.environ["FAKE_CODE"])


def record(directory: pathlib.Path, words: list[str]) -> None:
    with open(directory / "calls.jsonl", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(words) + "\n")


def refuse(reason: str) -> int:
    print(f"ERROR: (gcloud) {reason}", file=sys.stderr)
    return 1


def save(script: dict) -> None:
    partial = FAKE / f"script.{os.getpid()}"
    partial.write_text(json.dumps(script))
    partial.replace(FAKE / "script.json")


if __name__ == "__main__":
    sys.exit((gcloud if pathlib.Path(__file__).name == "gcloud" else on_worker)(sys.argv[1:]))

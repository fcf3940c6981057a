#!/usr/bin/env -S python3 -IS
"""A stand-in for gcloud: one queued resource whose states and workers are played from $FAKE/script.json.

Every call is a line of $FAKE/calls.jsonl. A worker is a directory with a home of its own, in which remote commands are run by
bash; `cmd_jax.main` there is fake_python.py. The script's keys, each a list of which every call takes the first element:
  creations   states that the resource goes through after being created, one a look; the last one stays
  runs        {"codes": exit code of each worker, "state": the resource's afterwards, "node": the node's, "hang": until SIGTERM,
              "lost": the connection, so that gcloud repeats the command}
  refusals    names of commands (create, delete, list, scp) that fail once
and `states` and `node`, what is there now.
"""

import fcntl
import json
import os
import pathlib
import sys

FAKE = pathlib.Path(os.environ["FAKE"])
WORKERS = 2
LOOKS = 36


def main(words: list[str]) -> int:
    script = json.loads((FAKE / "script.json").read_text())
    group, verb = words[2], words[3]
    script["looks"] = script.get("looks", 0) + (verb == "list")
    if script["looks"] > LOOKS:
        script["refusals"].append("list")  # a script that would wait forever ends
    if verb in script["refusals"]:
        script["refusals"].remove(verb)
        save(script)
        print("ERROR: (gcloud) UNAVAILABLE", file=sys.stderr)
        return 1
    save(script)
    if verb == "list":
        shown = look(script) if group == "queued-resources" else script["node"]
        print(shown or "", end="\n" if shown else "")
        return 0
    if verb == "create":
        if script["states"]:
            print("ERROR: (gcloud) ALREADY_EXISTS", file=sys.stderr)
            return 1
        script["states"] = script["creations"].pop(0) if script["creations"] else ["ACTIVE"]
        script["node"] = "READY"
        import shutil  # only where needed: there are hundreds of calls

        for worker in range(WORKERS):
            shutil.rmtree(FAKE / f"worker{worker}", ignore_errors=True)
            (FAKE / f"worker{worker}").mkdir()
        save(script)
        return 0
    if verb == "delete":
        if not script["states"]:
            print("ERROR: (gcloud) NOT_FOUND", file=sys.stderr)
            return 1
        script["states"], script["node"] = [], None
        save(script)
        return 0
    if (script["states"] or [None])[0] != "ACTIVE" or script["node"] != "READY":
        print("ERROR: (gcloud) the node is not READY", file=sys.stderr)
        return 1
    workers = range(WORKERS) if "--worker=all" in words else [0]
    if verb == "scp":
        source, target = words[4], words[5].split(":")[1]
        for worker in workers:
            (FAKE / f"worker{worker}" / target).write_bytes(pathlib.Path(source).read_bytes())
        return 0
    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    return ssh(script, list(workers), command)


def ssh(script: dict, workers: list[int], command: str) -> int:
    import subprocess
    import threading
    import time

    run = None
    if " train " in command:
        run = script["runs"].pop(0)
        save(script)
    codes = {}

    def on(worker: int) -> None:
        home = FAKE / f"worker{worker}"
        extra = {"FAKE_CODE": str(run["codes"][worker] if run else 0), "FAKE_HANG": str(int(bool(run and run.get("hang"))))}
        path = f"{FAKE / 'worker-bin'}:{os.environ['PATH']}"
        environ = {**os.environ, **extra, "HOME": str(home), "PATH": path}
        if run and run.get("lost"):
            subprocess.Popen(["bash", "-c", command], cwd=home, env={**environ, "FAKE_HANG": "1"})
            while not (home / "training").exists():
                time.sleep(0.02)
        codes[worker] = subprocess.run(["bash", "-c", command], cwd=home, env=environ, check=False).returncode

    threads = [threading.Thread(target=on, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if run:
        script = json.loads((FAKE / "script.json").read_text())  # other calls may have changed it meanwhile
        if script["states"]:
            script["states"], script["node"] = [run.get("state", "ACTIVE")], run.get("node", "READY")
            save(script)
    return next((codes[worker] for worker in workers if codes[worker]), 0)


def look(script: dict) -> str | None:
    if not script["states"]:
        return None
    state = script["states"][0]
    if len(script["states"]) > 1:
        script["states"].pop(0)
        save(script)
    return state


def save(script: dict) -> None:
    partial = FAKE / f"script.{os.getpid()}"
    partial.write_text(json.dumps(script))
    partial.replace(FAKE / "script.json")


if __name__ == "__main__":
    with open(FAKE / "calls.jsonl", "a", encoding="utf-8") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    sys.exit(main(sys.argv[1:]))

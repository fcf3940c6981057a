#!/usr/bin/env bash
# What tpu_vm.sh does on each worker, in the unpacked commit:
#   install        a Python of its own, this package for TPUs, then the command in $SETUP
#   train FLAGS    cmd_jax.main; where a training is left from a lost connection, it is stopped instead, with exit code 75
#   stop           asks the training to save and waits for its end, $STOP_S seconds at most
#   code           exit code of the last training
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
UV=0.13.9
kept=$HOME/.cmd-jax  # outlives the unpacked commit
mkdir -p "$kept"

install() {
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user "uv==$UV"
  uv venv --quiet --clear --python 3.12 "$kept/venv"  # the images bring 3.10
  uv pip install --quiet --python "$kept/venv/bin/python" --constraint requirements.lock --editable '.[tpu,gcs]'
  [[ -z ${SETUP:-} ]] || bash -c "$SETUP"
}

train() {
  exec 9>"$kept/lock"  # held by the training itself, so as long as it lives
  if ! flock --nonblock 9; then
    stop
    return 75  # all workers must start together
  fi
  rm -f "$kept/code"
  local code=0
  "$kept/venv/bin/python" -m cmd_jax.main --distributed "$@" &
  echo $! >"$kept/pid"
  wait $! || code=$?
  echo "$code" >"$kept/code"
  return "$code"
}

stop() {
  flock --nonblock "$kept/lock" true && return
  kill -TERM "$(cat "$kept/pid")" || true
  flock --timeout "${STOP_S:-120}" "$kept/lock" true || kill -KILL "$(cat "$kept/pid")"
}

case ${1:-} in
  install | stop) "$1" ;;
  train) shift; train "$@" ;;
  code) cat "$kept/code" ;;
  *) sed -n '2,6p' "${BASH_SOURCE[0]}" >&2; exit 64 ;;
esac

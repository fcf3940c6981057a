#!/usr/bin/env bash
# Trains on Cloud TPU VMs (queued resources); README.md beside this file explains costs and variables.
#   PROJECT=... ZONE=... WORKDIR=gs://BUCKET/RUN launch/tpu_vm.sh watch --config=configs/cub.py
#       creates the TPU, installs this commit on all workers, trains, recreates it after a preemption, deletes it at the end
#   PROJECT=... ZONE=... launch/tpu_vm.sh status | delete
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=${NAME:-cmd-jax}                # of the queued resource and its node
TYPE=${TYPE:-v6e-8}                  # accelerator type
SPOT=${SPOT:-1}                      # 0: on demand, never preempted, dearer
SETUP=${SETUP:-}                     # a shell command for every worker after the installation, such as copying data there
KEEP=${KEEP:-0}                      # 1: leave the TPU (and its cost) when the script ends
MAX_FAILURES=${MAX_FAILURES:-5}      # in a row, of a program or a request that no preemption explains
POLL_S=${POLL_S:-30}                 # seconds between two looks at the state
STOP_S=${STOP_S:-120}                # seconds that an interrupted training has to save

BAD_USAGE=64

say() { printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$NAME" "$*" >&2; }
die() { printf 'error: %s\n' "$2" >&2; exit "$1"; }
pause() { sleep "$POLL_S" & wait $!; }  # unlike a sleep in the foreground, a signal ends it

tpus() { gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT" --quiet; }
# A list is empty where nothing is there, and fails where the question failed; describe fails for both.
queued_state() { tpus queued-resources list --filter="name~/$NAME\$" --format='value(state.state)'; }
node_state() { tpus tpu-vm list --filter="name~/$NAME\$" --format='value(state)'; }
on_workers() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }

# ready: can be trained on; lost: must be deleted first; absent; pending: wait.
condition() {
  local queued node tries
  for ((tries = 1; tries <= 5; tries++)); do
    if queued=$(queued_state) && { [[ $queued != ACTIVE ]] || node=$(node_state); }; then
      case $queued:${node:-} in
        ACTIVE:READY) echo ready ;;
        ACTIVE: | ACTIVE:PREEMPTED | ACTIVE:TERMINATED | ACTIVE:STOPPED) echo lost ;;
        SUSPENDING:* | SUSPENDED:* | FAILED:*) echo lost ;;
        :*) echo absent ;;
        *) echo pending ;;
      esac
      say "queued resource ${queued:-absent}${node:+, node $node}"
      return
    fi
    say "no answer about the state (try $tries of 5)"
    pause
  done
  die 1 "gcloud does not answer; check the network and \`gcloud auth list\`"
}

create() {
  local spot=()
  [[ $SPOT == 0 ]] || spot=(--spot)
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
}

delete() {
  local state tries
  for ((tries = 1; tries <= 10; tries++)); do
    if state=$(queued_state); then
      [[ -n $state ]] || return 0
      [[ $state == DELETING ]] || tpus queued-resources delete "$NAME" --force || say "not deleted (try $tries of 10)"
      state=$(queued_state) && [[ -z $state ]] && say "deleted" && return 0
    fi
    pause
  done
  printf 'error: %s may still cost money; delete it: PROJECT=%s ZONE=%s NAME=%s launch/tpu_vm.sh delete\n' \
    "$NAME" "$PROJECT" "$ZONE" "$NAME" >&2
  return 1
}

# Returns when the TPU can be trained on; fails where a request failed.
provide() {
  local now before=
  while :; do
    now=$(condition) || exit 1
    case $now in
      ready) return 0 ;;
      absent)
        installed=0
        create || return 1 ;;
      lost)
        delete || exit 1
        [[ -z $before ]] || return 1 ;;  # lost while it was waited for
      pending) pause ;;
    esac
    before=$now
  done
}

install() {
  local archive unpack
  # A training left by a script that was killed must not lose its files while it saves.
  unpack="[[ ! -e cmd-jax ]] || STOP_S=$STOP_S bash cmd-jax/launch/tpu_worker.sh stop; rm -rf cmd-jax && mkdir cmd-jax && tar xzf cmd-jax.tgz -C cmd-jax"
  archive=$(mktemp -d)
  git archive --format=tar.gz --output="$archive/cmd-jax.tgz" HEAD &&
    tpus tpu-vm scp "$archive/cmd-jax.tgz" "$NAME:cmd-jax.tgz" --worker=all &&
    on_workers "$unpack && SETUP=$(printf %q "$SETUP") bash cmd-jax/launch/tpu_worker.sh install"
  local code=$?
  rm -rf "$archive"
  return $code
}

train() {
  local code=0
  on_workers "STOP_S=$STOP_S bash cmd-jax/launch/tpu_worker.sh train $(printf '%q ' "--workdir=$WORKDIR" "$@")" &
  connection=$!
  wait "$connection" || code=$?
  connection=
  # gcloud returns the first failing worker's code in their order; the reason may be another worker's.
  if ((code != 0)) && [[ $(condition) == ready ]]; then
    local codes reason
    codes=$(on_workers "bash cmd-jax/launch/tpu_worker.sh code") || codes=
    reason=$(grep -m 1 -xE '64|65|70' <<<"$codes") && code=$reason
  fi
  return "$code"
}

watch() {
  local failures=0 code
  installed=0
  while ((failures < MAX_FAILURES)); do
    if ! provide; then
      failures=$((failures + 1))
      say "the request came to nothing ($failures of $MAX_FAILURES in a row)"
      pause
      continue
    fi
    code=0
    if ((installed == 0)); then
      say "installing $(git rev-parse --short HEAD) on all workers"
      install && installed=1 || code=$?
    fi
    if ((installed == 1)); then
      say "training; results go to $WORKDIR"
      train "$@" || code=$?
    fi
    case $installed:$code in
      1:0) say "done"; return 0 ;;
      1:64 | 1:65 | 1:70) say "the program ended with $code, which a retry would repeat"; return "$code" ;;
      1:75) failures=0; say "preempted and saved; going on from the newest checkpoint" ;;
      *)
        if [[ $(condition) == ready ]]; then
          failures=$((failures + 1))
          say "ended with $code ($failures of $MAX_FAILURES in a row); going on from the newest checkpoint"
        else
          failures=0
          say "the TPU was taken; going on from the newest checkpoint"
        fi ;;
    esac
    pause
  done
  die 1 "$NAME: gave up after $MAX_FAILURES failures in a row; the output above says why; the same command goes on from $WORKDIR"
}

# One watch for one TPU: a second one would stop the first one's training.
claim() {
  lock=${TMPDIR:-/tmp}/cmd-jax.$PROJECT.$ZONE.$NAME.pid
  local other
  other=$(cat "$lock" 2>/dev/null) && kill -0 "$other" 2>/dev/null &&
    die $BAD_USAGE "process $other works on $NAME already ($lock); stop it, or choose another NAME"
  echo $$ >"$lock"
}

finish() {
  local code=$?
  trap '' INT TERM HUP
  if [[ $KEEP == 1 ]]; then
    say "kept, and costs money until: PROJECT=$PROJECT ZONE=$ZONE NAME=$NAME launch/tpu_vm.sh delete"
  else
    delete || { ((code != 0)) || code=1; }
  fi
  rm -f "$lock"
  exit "$code"
}

interrupted() {
  trap 'exit '"$1" INT TERM HUP  # a second signal skips the saving, not the deletion
  if [[ -n ${connection:-} ]]; then
    say "interrupted; the training has $STOP_S s to save"
    on_workers "STOP_S=$STOP_S bash cmd-jax/launch/tpu_worker.sh stop" & wait $! || true
    kill "$connection" 2>/dev/null || true
  fi
  exit "$1"
}

usage() { sed -n '3,5p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit $BAD_USAGE; }

command=${1:-}
shift || usage
[[ -n ${PROJECT:-} ]] || die $BAD_USAGE "PROJECT is not set; set it to the Google Cloud project"
[[ -n ${ZONE:-} ]] || die $BAD_USAGE "ZONE is not set; set it to a zone with TPUs of the type, as us-east5-b"
# The script deletes whatever has such a name, and nothing else.
[[ $NAME =~ ^cmd-jax[a-z0-9-]*$ ]] || die $BAD_USAGE "NAME=$NAME must start with cmd-jax and go on in a-z, 0-9 and -, as cmd-jax-cub"
case $command in
  watch)
    [[ ${WORKDIR:-} == gs://* ]] || die $BAD_USAGE "WORKDIR=${WORKDIR:-} is no gs:// path; workers share no disk, and theirs goes with them"
    case $TYPE in
      v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
      v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
      v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
      v4-*) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
      *) [[ -n ${RUNTIME:-} ]] || die $BAD_USAGE "TYPE=$TYPE is not known here; set RUNTIME to its runtime version" ;;
    esac
    git rev-parse --verify --quiet HEAD >/dev/null || die $BAD_USAGE "$PWD is no git checkout; the workers get its HEAD"
    [[ -z $(git status --porcelain --untracked-files=no) ]] || say "warning: changes that are not committed stay here"
    claim
    trap finish EXIT
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    trap 'interrupted 129' HUP
    watch "$@" ;;
  status) condition ;;
  delete)
    claim
    trap 'rm -f "$lock"' EXIT
    delete ;;
  *) usage ;;
esac

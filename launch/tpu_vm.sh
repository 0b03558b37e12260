#!/usr/bin/env bash
# Train on a Cloud TPU slice: create it or reuse it, install, train on all its workers, show the
# first one's log; after a preemption create it anew and go on from the last checkpoint.
#
#   NAME=deit ZONE=us-west4-a TYPE=v5litepod-64 launch/tpu_vm.sh --config=configs/deit.py \
#       --config.data.dir=gs://my-bucket/tfds --workdir=gs://my-bucket/runs/b
#   NAME=deit ZONE=us-west4-a launch/tpu_vm.sh delete
#
# SPOT=1      a slice that may be preempted, and costs less
# VERSION=…   the TPU software; by default the one for TYPE
# CACHE=…     a folder of the workers, on a disk that has room for a copy of the data
# DELETE=1    delete the slice when the training has ended well
# Started again while the training runs, it shows its log again. Needs gcloud, logged in.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?give NAME=… of the slice}" "${ZONE:?give ZONE=…, as in us-west4-a}"
poll="${POLL_SECONDS:-20}"

say() { echo "tpu_vm.sh: $*" >&2; }
tpu() { gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on_workers() { tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }
node_state() { tpu tpu-vm describe "$NAME" --format='value(state)' 2>/dev/null || echo NONE; }
request_state() {
    tpu queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || echo NONE
}
delete() { tpu queued-resources delete "$NAME" --force; }

version() {
    case "$TYPE" in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

ensure_slice() {
    local state
    while state="$(request_state)" && [ "$state" != ACTIVE ]; do
        case "$state" in
            NONE)
                local spot=()
                if [ "${SPOT:-0}" = 1 ]; then spot=(--spot); fi
                : "${TYPE:?give TYPE=…, as in v5litepod-64}"
                say "asking for $TYPE"
                tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
                    --runtime-version="${VERSION:-$(version)}" "${spot[@]}"
                ;;
            FAILED | SUSPENDED | SUSPENDING)
                say "the request is $state; asking again"
                delete
                ;;
            *)
                say "the request is $state"
                sleep "$poll"
                ;;
        esac
    done
}

install() {
    local package
    package="$(mktemp -d)"
    git archive --format=tar.gz --prefix=deit_jax/ --output="$package/deit_jax.tar.gz" HEAD
    printf '%q ' ${CACHE:+env "XDG_CACHE_HOME=$CACHE"} .venv/bin/deit train --multihost "$@" \
        >"$package/train.sh"
    say "installing on all workers"
    tpu tpu-vm scp "$package/deit_jax.tar.gz" "$package/train.sh" "$NAME:" --worker=all
    rm -r "$package"
    on_workers all "tar xzf deit_jax.tar.gz && bash deit_jax/launch/tpu_worker.sh install"
}

# Return the exit status of `deit train` on the first worker.
train() {
    if ! on_workers 0 'bash deit_jax/launch/tpu_worker.sh running' 2>/dev/null; then
        install "$@"
        on_workers all 'bash deit_jax/launch/tpu_worker.sh start'
    fi
    on_workers 0 'bash deit_jax/launch/tpu_worker.sh follow'
}

if [ "${1:-}" = delete ]; then
    delete
    exit
fi
while true; do
    ensure_slice
    code=0
    train "$@" || code=$?
    if [ "$code" = 0 ]; then
        break
    fi
    state="$(node_state)"
    if [ "$state" != READY ]; then
        say "the slice is $state; creating it anew"
        delete || true
    elif [ "$code" != 75 ]; then # 75: told to stop, and saved
        say "the training failed with exit code $code; the slice is kept"
        exit "$code"
    fi
done
if [ "${DELETE:-0}" = 1 ]; then
    delete
fi

#!/usr/bin/env bash
# Train on this machine: launch/local.sh --config=… --workdir=…
# One process drives all local GPUs. PROCESSES=N starts N, each with its share of the GPUs, as on
# several hosts. Ctrl-C or SIGTERM lets them save their state first.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
# Leave the allocator most of the memory, but not what other programs on the display may need.
if [ -z "${XLA_CLIENT_MEM_FRACTION:-}" ]; then # its newer name; JAX takes only one of them
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
fi

processes="${PROCESSES:-1}"
if [ "$processes" = 1 ]; then
    exec deit train "$@"
fi

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
if ((gpus % processes)); then
    echo "launch/local.sh: PROCESSES=$processes does not divide the $gpus GPUs" >&2
    exit 2
fi
set -m # groups of their own: Ctrl-C reaches them once, through the trap, and not twice
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
    if ((gpus)); then
        share=$((gpus / processes))
        CUDA_VISIBLE_DEVICES="$(seq -s, $((i * share)) $((i * share + share - 1)))"
        export CUDA_VISIBLE_DEVICES
    fi
    deit train "$@" --multihost --coordinator="localhost:${PORT:-12345}" \
        --num_processes="$processes" --process_id="$i" &
    pids+=("$!")
done
code=0
for pid in "${pids[@]}"; do
    # A signal interrupts the wait, not the process: wait again.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    wait "$pid" || code=$?
done
exit "$code"

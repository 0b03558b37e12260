#!/usr/bin/env bash
# Train on this machine: launch/local.sh --config=… --workdir=…
# One process drives all local GPUs. PROCESSES=N starts N, each with its share of the GPUs, as on
# several hosts.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
# Leave the allocator most of the memory, but not what other programs on the display may need.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

processes="${PROCESSES:-1}"
if [ "$processes" = 1 ]; then
    exec deit train "$@"
fi

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < processes; i++)); do
    if ((gpus >= processes)); then
        share=$((gpus / processes))
        visible="$(seq -s, $((i * share)) $((i * share + share - 1)))"
        export CUDA_VISIBLE_DEVICES="$visible"
    fi
    deit train "$@" --multihost --coordinator="localhost:${PORT:-12345}" \
        --num_processes="$processes" --process_id="$i" &
    pids+=("$!")
done
for pid in "${pids[@]}"; do
    wait -n  # the first process to fail ends the run, and the trap its siblings
done

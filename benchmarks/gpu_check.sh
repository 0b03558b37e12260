#!/usr/bin/env bash
# What holds on one NVIDIA GPU, in ten minutes: checks, tests, the quickstart, times of parts, the
# first rows of a table beside PyTorch. The same command goes on where it ended, with more rows.
#
#   pip install --editable '.[cuda13,viz]' pytest pytest-xdist torch torchvision timm
#   bash benchmarks/gpu_check.sh
#   OUT=DIR T=300 PYTHON=python3 bash ...     results in DIR, 300 seconds in all, that interpreter
#
# Without network, run benchmarks/gpu_prepare.sh elsewhere and bring the folder .gpu along.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export OUT="${OUT:-runs/gpu_check}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
"$PYTHON" -m benchmarks.gpu_check --out="$OUT" --seconds="${T:-575}" "$@" 2>&1 | tee -a "$OUT/log.txt"

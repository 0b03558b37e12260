#!/usr/bin/env bash
# What tpu_vm.sh has each worker of a slice do: install, start, running, follow.
set -euo pipefail
cd "$(dirname "$0")/.."

case "$1" in
    install)
        # The images come with Python 3.10; uv brings a newer one.
        command -v ~/.local/bin/uv >/dev/null || curl -fsSL https://astral.sh/uv/install.sh | sh
        [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
        ~/.local/bin/uv pip install --quiet --editable '.[tpu,fast,viz,gcs]'
        ;;
    start)
        rm -f train.code
        # Apart from this connection, which may end before the training does.
        nohup bash -c 'bash ~/train.sh >train.log 2>&1; echo $? >train.code' >/dev/null 2>&1 &
        echo $! >train.pid
        ;;
    running)
        [ -f train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null
        ;;
    follow)
        tail --pid="$(cat train.pid)" --lines=+1 --follow=name --retry train.log 2>/dev/null
        exit "$(cat train.code)"
        ;;
    *)
        echo "tpu_worker.sh: $1: give install, start, running or follow" >&2
        exit 2
        ;;
esac

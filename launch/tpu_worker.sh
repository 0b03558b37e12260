#!/usr/bin/env bash
# What tpu_vm.sh has each worker of a slice do: install [BUCKET], start, running, follow.
set -euo pipefail
cd "$(dirname "$0")/.."

mount_bucket() {
    if ! command -v gcsfuse >/dev/null; then
        local list="deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt"
        curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
            sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
        echo "$list gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
        sudo apt-get update -qq && sudo apt-get install -qq gcsfuse
    fi
    mkdir -p bucket
    mountpoint -q bucket || gcsfuse --implicit-dirs "$1" bucket
}

case "$1" in
    install)
        # The images come with Python 3.10; uv brings a newer one.
        command -v ~/.local/bin/uv >/dev/null || curl -fsSL https://astral.sh/uv/install.sh | sh
        [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
        ~/.local/bin/uv pip install --quiet --editable '.[tpu,fast,viz]'
        if [ -n "${2:-}" ]; then mount_bucket "$2"; fi
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

#!/usr/bin/env bash
# Fill .gpu, which git ignores, with what a GPU machine without network may lack, for gpu_check.sh:
# wheels of the few packages that images with JAX and PyTorch do not have. Of them only those that
# are missing there are installed. PYTHON_VERSION=3.12, that of the other machine.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .gpu/wheels
packages=(ml_collections grain array_record portpicker simplejpeg tensorboardX kornia-rs flatbuffers)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels \
    --implementation cp --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" "${packages[@]}"
# Where only .gpu is kept from one copy of this folder to the next: what is done is kept outside.
cat >.gpu/gpu_check.sh <<'SCRIPT'
#!/usr/bin/env bash
STATE="${STATE:-/tmp/deit_jax_gpu_check}" exec bash benchmarks/gpu_check.sh "$@"
SCRIPT
du -sh .gpu
ls .gpu/wheels

#!/bin/sh
# Installs PyTorch, the oracle of the tests, as a CPU build where one is to be had.
# usage: PYTHON=.venv/bin/python sh tools/install_torch.sh torch==2.13.0
#
# In order: a torch that is there already; the index in TORCH_INDEX_URL; whatever pip finds, which on Linux may bring gigabytes of CUDA: then it
# says so first. (The CPU index is named on PyTorch's install page.)
set -eu
requirement=$1
"$PYTHON" -c 'import torch' 2>/dev/null && exit 0
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    exec "$PYTHON" -m pip install --quiet "$requirement" --index-url "$TORCH_INDEX_URL"
fi
if "$PYTHON" -m pip install --quiet --dry-run --report - "$requirement" | grep -q '"name": "nvidia-'; then
    echo "note: the only build of $requirement that pip sees brings CUDA, several GB. Interrupt and set TORCH_INDEX_URL to" >&2
    echo "PyTorch's CPU index to avoid that." >&2
fi
exec "$PYTHON" -m pip install --quiet "$requirement"

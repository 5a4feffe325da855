#!/bin/sh
# Installs PyTorch, the oracle of the tests, without gigabytes of CUDA packages.
# usage: PYTHON=.venv/bin/python sh tools/install_torch.sh torch==2.13.0
#
# Three ways, in order: a torch that is there already; a CPU build among what pip is configured to see; PyTorch's own CPU index.
# A build is refused when it would bring CUDA with it, because a test machine's disk and minutes are not ours to spend.
set -eu
requirement=$1
"$PYTHON" -c 'import torch' 2>/dev/null && exit 0
plan=$("$PYTHON" -m pip install --quiet --dry-run --report - "$requirement" 2>/dev/null || true)
if [ -n "$plan" ] && ! printf '%s' "$plan" | grep -q '"name": "nvidia-'; then
    exec "$PYTHON" -m pip install --quiet "$requirement"
fi
exec "$PYTHON" -m pip install --quiet "$requirement" --index-url "${TORCH_INDEX_URL:?no CPU build of $requirement is visible to pip; set TORCH_INDEX_URL to the CPU index named on the PyTorch install page, or install torch into the venv by hand}"

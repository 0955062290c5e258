#!/usr/bin/env bash
# Everything that a GPU is needed for, in a few minutes: the tests, then the loss beside its rivals.
#
#     benchmarks/gpu.sh [FOLDER]      # writes gpu.json and the output of both; default: gpu-results
#
# Needs torch for CUDA, and what `pip install -e '.[dev,peft]'` installs. Rivals are measured if they
# are installed: `pip install -e '.[bench]'`.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
mkdir -p "$folder"
python -m pytest -p no:cacheprovider tests/test_gpu.py tests/losses/test_kernels.py \
    tests/losses/test_kernels_in_fused_loss.py tests/losses/test_kernels_compiled.py \
    -o addopts='--import-mode=importlib -q' 2>&1 | tee "$folder/tests.txt"
tested=$?
PYTHONPATH=benchmarks python benchmarks/gpu.py --output "$folder/gpu.json" 2>&1 | tee "$folder/loss.md"
exit $(( tested + $? ))

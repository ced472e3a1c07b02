#!/usr/bin/env bash
# Correctness and speed of thresher on this machine's NVIDIA GPU, in under eight minutes: one table, and
# build/gpu-report.json.  Needs torch with CUDA and Triton, and what .[dev] installs; uses onnxruntime-gpu,
# TensorRT and TensorRT-RTX where they are there.  Arguments go to tests/gpu/report.py: --only, --seconds, ...
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
mkdir -p build/path
ln -sfn "$PWD" build/path/thresher # this checkout, whether or not one is installed
export PYTHONPATH="$PWD/build/path${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_INTERPRET=${TRITON_INTERPRET:-0} HF_HUB_OFFLINE=1
exec "$python" -m tests.gpu.report --json build/gpu-report.json "$@"

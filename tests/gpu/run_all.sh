#!/usr/bin/env bash
# Correctness and speed of thresher on this machine's NVIDIA GPU, in under eight minutes: one table, and
# build/gpu-report.json.  Needs torch with CUDA and Triton, and .[dev]; uses onnxruntime-gpu, TensorRT and
# TensorRT-RTX where they are installed.  Arguments go to tests/gpu/report.py (--only, --seconds, --json).
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p build
export TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m tests.gpu.report --json build/gpu-report.json "$@"

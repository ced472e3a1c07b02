#!/usr/bin/env bash
# Learned token modules of the shipped model at half of the work, against methods that learn nothing, on Fashion-MNIST.
# Trains on the training split, 100 steps of 32 images each, judges on the first 2,000 test images.
#
#   tests/benchmarks/modules.sh FOLDER
set -euo pipefail
out=$1 model=thresher.models.fashion:vit
mkdir -p "$out"

PYTHONPATH=. python - "$out/train.npz" <<'END'
import sys
import numpy as np
from tests.benchmarks.data import fashion_mnist
images, labels = fashion_mnist("train")
np.savez(sys.argv[1], images=images, labels=labels)
END
cd "$out"

train() {
    name=$1 && shift
    thresher optimize $model --recipe "$name" --flops 0.5 --set steps=100 "$@" --learn-data train.npz --threads 1 -o "$name"
}
evit_and_head() {
    name=$1 && shift
    thresher optimize $model --recipe clca --flops 0.5 --set "steps=$1" --set "cache=$2" --learn-data train.npz --threads 1 -o "$name"
}
train sit
train patch-merger --set 'layers=[1]'
train dynamic-vit
train dtem
evit_and_head clca 100 true
evit_and_head clca-head 100 false
evit_and_head clca-start 0 true

thresher compare $model --data fashion-mnist --limit 2000 --flops 0.5 --threads 2 -o compared \
    --methods tome,diffrate,evit,sit/recipe.yaml,patch-merger/recipe.yaml,dynamic-vit/recipe.yaml,dtem/recipe.yaml,clca/recipe.yaml,clca-head/recipe.yaml,clca-start/recipe.yaml

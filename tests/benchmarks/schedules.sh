#!/usr/bin/env bash
# Schedules of one model side by side: constant, linear, learned and searched, on Fashion-MNIST.
# Learns and searches on the training split, judges on the 10,000 test images: three quarters of an hour on two cores.
#
#   tests/benchmarks/schedules.sh FOLDER
set -euo pipefail
out=$1 model=thresher.models.fashion:vit threads=2
mkdir -p "$out"

PYTHONPATH=. python - "$out/train.npz" <<'END'
import sys
import numpy as np
from tests.benchmarks.data import fashion_mnist
images, labels = fashion_mnist("train")
np.savez(sys.argv[1], images=images, labels=labels)
END
cd "$out"

tome() { printf 'name: %s\npasses:\n  - tome: {r: %s, inflect: -1}\n  - cleanup\n' "$1" "$2" > "$1.yaml"; }
tome linear-0.8 9
tome linear-0.65 16
tome linear-0.5 24

for share in 0.8 0.65 0.5; do
    thresher optimize $model --recipe diffrate --flops $share --learn-data train.npz --threads $threads -o learned-$share.run
    cp learned-$share.run/recipe.yaml learned-$share.yaml
done
search() { thresher search $model --method tome --data train.npz --limit 3000 --rounds 5 --threads $threads "$@"; }
search --strategy g-search --tolerance 0.1 -o g-search.run
cp g-search.run/best.yaml g-search.yaml
for share in 0.65 0.5; do
    search --strategy p-sigmoid --flops $share --trials 24 -o p-sigmoid-$share.run
    cp p-sigmoid-$share.run/best.yaml p-sigmoid-$share.yaml
done

thresher compare $model --data fashion-mnist --threads $threads --no-control -o compared \
    --methods tome,diffrate,linear-0.8.yaml,linear-0.65.yaml,linear-0.5.yaml,learned-0.8.yaml,learned-0.65.yaml,learned-0.5.yaml,g-search.yaml,p-sigmoid-0.65.yaml,p-sigmoid-0.5.yaml

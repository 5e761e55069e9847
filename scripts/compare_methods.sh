#!/usr/bin/env bash
# Every method on the same images, budget and evaluations: one table and one plot, with seeds and intervals.
#   usage: bash scripts/compare_methods.sh [CARD] [pretrain.py flags ...]     CARD: cifar10-demo (default), cifar10, imagenet
#   SEEDS="0 1 2" (default "0"), METHODS="barlow_twins simclr ..." (default all five), in the environment
# Runs are runs/compare-<card>-<method>-<seed>; what is done already is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
card=${1:-cifar10-demo}; shift || true

runs=()
for seed in ${SEEDS:-0}; do
  for method in ${METHODS:-barlow_twins simclr byol simsiam vicreg}; do
    run=runs/compare-$card-$method-$seed
    runs+=("$run")
    .venv/bin/torchrun train/pretrain.py --preset "$card" --method "$method" --seed "$seed" --run "./$run" "$@"
    $python scripts/eval_all.py "$run" --only knn cached
  done
done
$python scripts/comparison_table.py --out "runs/compare-$card" "${runs[@]}"

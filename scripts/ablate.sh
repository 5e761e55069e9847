#!/usr/bin/env bash
# The ablations of the Barlow Twins paper on one card: one run each, the same evaluations, one table beside the paper's.
#   usage: bash scripts/ablate.sh [CARD] [pretrain.py flags ...]      CARD: cifar10-demo (default), cifar10, imagenet
#   SEEDS="0 1 2" (default "0"), ONLY="baseline invariance ..." (default: all below), in the environment
# Runs are runs/ablate-<card>-<name>-<seed>; what is done already is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
card=${1:-cifar10-demo}; shift || true

# Widths and learning rates follow the card, so that one line serves all three.
eval "$($python - "$card" <<'EOF'
import sys
from train.cards import PRESETS
card = PRESETS[sys.argv[1]]
widths = card.projector.split("-")
last = int(widths[-1])
print(f"width={last}; half={last // 2}; double={2 * last}; hidden={widths[0]}")
EOF
)"

ablations=(
  "baseline"
  "invariance|--loss invariance"
  "redundancy|--loss redundancy"
  "feature-norm|--embedding-norm feature"
  "no-projector-bn|--projector-norm none"
  "no-norm|--projector-norm none --embedding-norm none"
  "cross-entropy|--loss cross-entropy"
  "stop-gradient|--stop-gradient"
  "predictor|--predictor $width-$width"
  "stop-gradient-predictor|--stop-gradient --predictor $width-$width"
  "no-grey|--without grey"
  "no-jitter|--without grey jitter"
  "crop-blur|--without grey jitter solarize"
  "crop-only|--without grey jitter solarize blur"
  "no-crop|--without crop"
  "width-half|--projector $hidden-$half"
  "width-double|--projector $hidden-$double"
  "depth-1|--projector $width"
  "depth-3|--projector $hidden-$hidden-$width"
  "batch-512|--global-batch 512"
  "batch-1024|--global-batch 1024"
  "batch-2048|--global-batch 2048"
)

runs=()
for seed in ${SEEDS:-0}; do
  for ablation in "${ablations[@]}"; do
    name=${ablation%%|*}; flags=${ablation#"$name"}; flags=${flags#|}
    [[ -z "${ONLY:-}" || " $ONLY " == *" $name "* ]] || continue
    run=runs/ablate-$card-$name-$seed
    runs+=("$run")
    # shellcheck disable=SC2086  (flags are words)
    .venv/bin/torchrun train/pretrain.py --preset "$card" --seed "$seed" --run "./$run" $flags "$@"
    $python scripts/eval_all.py "$run" --only knn cached
  done
done
$python scripts/comparison_table.py --rows ablation --out "runs/ablate-$card" "${runs[@]}"

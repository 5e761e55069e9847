#!/usr/bin/env bash
# The main job, small and whole: CIFAR-10 → .beton → Barlow Twins → kNN, linear, 10 % semi-supervised → a table.
#   usage: bash scripts/demo.sh [pretrain.py flags ...]       5 to 7 minutes on 2 CPU cores, downloads apart
# The table has three rows: raw pixels, an untrained encoder of the same architecture, and the trained one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A thread with nothing to do sleeps. By default it spins, and where cores are shared it takes them from the others.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
bash scripts/setup.sh
python=.venv/bin/python
data=data/cifar10
start=$SECONDS

if [[ ! -f $data/train.manifest.json || ! -f $data/val.manifest.json ]]; then
  $python scripts/fetch_cifar10.py --out $data/source
  $python pipeline/convert.py --source $data/source --out $data
fi

rm -rf runs/demo runs/demo-untrained   # the demo measures a run from its first step
$python train/pretrain.py --preset cifar10-demo --name demo-untrained --epochs 0
$python train/pretrain.py --preset cifar10-demo --name demo "$@"
$python -m pipeline.preview --data $data --views cifar10 --resolution 32 --images 8 --out runs/demo/views.png

evaluate() {
  $python eval/knn.py --checkpoint "$1"
  $python eval/linear.py --checkpoint "$1" --cached
  $python eval/semisup.py --checkpoint "$1" --fraction 0.1 --epochs 10 --validate-every 10
}
# The untrained control is measured beside the others: much of an evaluation is one thread's. It has a process group of
# its own, so that nothing of it is left where this script ends early.
log=runs/demo-untrained/evaluations.log
set -m; evaluate runs/demo-untrained >$log 2>&1 & control=$!; set +m
trap 'kill -- -$control 2>/dev/null || true' EXIT
$python eval/knn.py --checkpoint runs/demo --features pixels
$python eval/linear.py --checkpoint runs/demo --features pixels --cached
evaluate runs/demo
wait $control || { cat $log >&2; exit 1; }
$python eval/report.py runs/demo-untrained runs/demo
echo "demo: done in $((SECONDS - start)) s; the pictures and the table are in runs/demo"

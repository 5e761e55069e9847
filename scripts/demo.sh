#!/usr/bin/env bash
# The main job, small and whole: CIFAR-10 → .beton → Barlow Twins → kNN, linear, 10 % semi-supervised → a table.
#   usage: bash scripts/demo.sh [pretrain.py flags ...]       4 to 6 minutes on 2 CPU cores, downloads apart
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

# The rows of the table are measured side by side: much of an evaluation is one thread's. The untrained encoder and the
# pixels have process groups of their own, so that nothing of them is left where this script ends early.
cores=$(nproc); export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 2) / 3))}
encoder() {
  $python eval/knn.py --checkpoint "$1"
  $python eval/linear.py --checkpoint "$1" --cached
  $python eval/semisup.py --checkpoint "$1" --fraction 0.1 --epochs 10 --validate-every 10
}
pixels() {
  $python eval/knn.py --checkpoint runs/demo --features pixels
  $python eval/linear.py --checkpoint runs/demo --features pixels --cached
}
untrained_log=runs/demo-untrained/evaluations.log pixels_log=runs/demo/pixels.log
set -m
encoder runs/demo-untrained >$untrained_log 2>&1 & untrained=$!
pixels >$pixels_log 2>&1 & pixels=$!
set +m
trap 'kill -- -$untrained -$pixels 2>/dev/null || true' EXIT
encoder runs/demo
wait $pixels || { code=$?; cat $pixels_log >&2; exit $code; }
wait $untrained || { code=$?; cat $untrained_log >&2; exit $code; }
$python eval/report.py runs/demo-untrained runs/demo
echo "demo: done in $((SECONDS - start)) s; the pictures and the table are in runs/demo"

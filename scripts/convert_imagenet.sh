#!/usr/bin/env bash
# ImageNet → data/imagenet/{train,val}.beton, each with its manifest.
#   usage: IMAGENET=/path/to/imagenet bash scripts/convert_imagenet.sh [pipeline/convert.py flags ...]
# $IMAGENET has train/ and val/ with one folder a class; or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as
# downloaded, with ILSVRC2012_devkit_t12.tar.gz beside them (it knows the classes of the val images); or what Kaggle
# gives out (ILSVRC/ and LOC_val_solution.csv). val/ may also hold its images as its tar does, without class folders,
# with the devkit, LOC_val_solution.csv or imagenet_2012_validation_synset_labels.txt beside it.
# Of train, images with a side above 500 px are resized to that, JPEG quality 90 (--quality); val keeps its pixels, of
# which evaluations are published (--max-side resizes both). All others are kept byte for byte, after decoding each once
# to see that it is sound (--check quick looks at their start only: faster).
# Interrupted, the same command continues where it stopped. --out FOLDER puts the files elsewhere.
# On several machines: torchrun --nnodes=4 … --no-python bash scripts/convert_imagenet.sh, or --part 0/4 … --part 3/4.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

for flag in "$@"; do
  if [[ $flag == -h || $flag == --help ]]; then sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0; fi
done
if [[ -z "${IMAGENET:-}" ]]; then
  echo "error: IMAGENET is not set; set it to the folder that has ImageNet's train/ and val/ (or its tar files), for example: IMAGENET=/data/imagenet bash scripts/convert_imagenet.sh" >&2
  exit 2
fi
[[ -x $repo/.venv/bin/python ]] || { echo "error: .venv is missing; run: bash scripts/setup.sh" >&2; exit 2; }
exec "$repo/.venv/bin/python" "$repo/pipeline/convert.py" --source "$IMAGENET" --out "$repo/data/imagenet" --check full "$@"

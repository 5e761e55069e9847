#!/usr/bin/env bash
# What is to be measured on a GPU, in slots of minutes → OUT/report.md, OUT/report.json, OUT/stages/*.json; logs beside them.
#   usage: bash scripts/gpu_report.sh [--slot A|B|C] [--only STAGE …] [--images DIR | --data DIR] [--cifar DIR]
#                                     [--out DIR] [--way compile+graph] [--budget-s 480] [--dry-run]
#   slot A  card step gate kernels ways tests     B  card cifar linear     C  card decoders loader-dali (needs DALI)
# Ends within --budget-s seconds with the report printed. A stage that is complete is not run again. PYTHON names another
# interpreter than .venv's. --dry-run: toy size, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "error: $python is missing; run: bash scripts/setup.sh" >&2; exit 2; }
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" scripts/bench/gpu_report.py "$@"

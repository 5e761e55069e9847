#!/usr/bin/env bash
# Everything that is to be measured on a GPU: its tests, the view kernels, training steps on real and synthetic images,
# CIFAR-10 runs → OUT/report.json and OUT/report.md.
#   usage: bash scripts/gpu_report.sh [--images DIR] [--cifar DIR] [--out DIR] [--budget-s 540] [--dry-run]
# Fits a slot of --budget-s seconds: what is measured is kept, and the same command goes on where it stopped, in the
# middle of a training run too. PYTHON names another interpreter than .venv's. --dry-run: toy size, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-.venv/bin/python}" scripts/gpu_report.py "$@"

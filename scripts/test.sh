#!/usr/bin/env bash
# Sets up like the demo, with NVIDIA DALI and, where this user may install packages, FFCV; checks style and types, and
# runs the tests.
#   usage: bash scripts/test.sh [--fast] [pytest arguments ...]      --fast leaves out the tests marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ffcv=(); if [[ $EUID -eq 0 ]] || sudo -n true 2>/dev/null; then ffcv=(--ffcv); fi
bash scripts/setup.sh --dali ${ffcv[@]+"${ffcv[@]}"}

marks=""
if [[ "${1:-}" == --fast ]]; then marks="not slow"; shift; fi
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy --no-error-summary
# Files side by side, as many as there are cores: most of the time is one thread's. More than four need too much memory.
cores=$(nproc); workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / workers))}
.venv/bin/python -m pytest -m "$marks" -n "$workers" --dist loadfile --no-loadscope-reorder --durations=10 "$@"

#!/usr/bin/env bash
# Sets up like the demo, with NVIDIA DALI, checks the style and runs the tests.
#   usage: bash scripts/test.sh [--fast] [pytest arguments ...]      --fast leaves out the tests marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dali

marks=""
if [[ "${1:-}" == --fast ]]; then marks="not slow"; shift; fi
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/python -m pytest -m "$marks" --durations=10 "$@"

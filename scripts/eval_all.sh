#!/usr/bin/env bash
# Every evaluation of a run that the datasets here allow, then the table and the page; what is done is not done again.
#   usage: bash scripts/eval_all.sh RUN [eval_all.py flags ...]     RUN: a run folder, or a checkpoint file
#   bash scripts/eval_all.sh vit.pth --arch vit_b_16     somebody else's encoder (eval/README.md)
#   bash scripts/eval_all.sh RUN --plan      only says what would run, and what is missing and where it comes from
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/eval_all.py" "$@"

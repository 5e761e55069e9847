#!/usr/bin/env bash
# Sets up everything in a private .venv beside this checkout; running it again costs a second.
#   usage: bash scripts/setup.sh [--ffcv] [--dali]        then: source .venv/bin/activate
# Needs Python >= 3.11 (PYTHON=... picks one) and nothing else: no compiler, no root.
# --dali adds NVIDIA DALI (1.1 GB) for --loader dali. --ffcv adds FFCV for --loader ffcv: it is compiled, with OpenCV and
# other system packages that come through apt where this user may install. Without --ffcv it is compiled if all that is
# there already. An extra that is there stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 2; }

ffcv="" extras=test
for flag in "$@"; do
  case $flag in
    --ffcv) ffcv=asked ;;
    --dali) extras=test,dali ;;
    *) fail "$flag is not known; usage: bash scripts/setup.sh [--ffcv] [--dali]" ;;
  esac
done
is_there() { compgen -G ".venv/lib/python3*/site-packages/$1" >/dev/null; }
! is_there nvidia/dali || extras=test,dali

python=${PYTHON:-}
for candidate in .venv/bin/python python3 python3.13 python3.12 python3.11; do
  [[ -z $python ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate
done
"${python:=python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || fail "$python is $({ "$python" \
  --version || echo missing; } 2>/dev/null), Python 3.11 or newer is expected; set PYTHON=/path/to/python3.11 (conda and uv bring one without root)"

may_apt() { command -v apt-get >/dev/null && { [[ $EUID -eq 0 ]] || sudo -n true 2>/dev/null; }; }
apt_install() {
  local sudo=(env); [[ $EUID -eq 0 ]] || sudo=(sudo -n env)
  echo "setup: installing $* with apt" >&2
  "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# What FFCV is compiled with, and is not there.
missing=()
command -v g++ >/dev/null                    || missing+=(g++)
command -v pkg-config >/dev/null             || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null      || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
"$python" -c 'import sysconfig, pathlib, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || missing+=(python3-dev)
left_out=""
if is_there ffcv || ! ((${#missing[@]})); then ffcv=${ffcv:-found}
elif [[ -z $ffcv ]]; then left_out="missing: ${missing[*]}; bash scripts/setup.sh --ffcv gets it"
elif ! may_apt || ! apt_install "${missing[@]}"; then
  fail "FFCV cannot be compiled without ${missing[*]}; install these (Debian, Ubuntu: sudo apt-get install ${missing[*]}) and run this again, or leave --ffcv out: only --loader ffcv needs it"
fi

# The stamp names what was installed from what, so that a second run does nothing and a changed pin does. What this
# machine could compile is not in it: a shared checkout is also used on machines with other system packages.
stamp=$({ cat constraints.txt pyproject.toml scripts/setup.sh; "$python" --version; echo "$extras"; } | sha256sum | cut -d' ' -f1)
if [[ -f .venv/.setup-$stamp && -x .venv/bin/python ]] && { [[ $ffcv != asked ]] || is_there ffcv; }; then exit 0; fi
[[ -w . ]] || fail "$PWD is not yours to write: whoever may, sets it up once, then everybody can use it; or clone it to a folder of yours"

if [[ ! -x .venv/bin/python ]]; then
  rm -rf .venv  # its Python is no more, so nothing in it can run
  # Debian's Python cannot put pip into a new environment without the package python3-venv; uv or a pip outside can.
  "$python" -c 'import ensurepip' 2>/dev/null || command -v uv >/dev/null || "$python" -m pip --version >/dev/null 2>&1 ||
    { may_apt && apt_install python3-venv; } ||
    fail "$python can make no virtual environment; install python3-venv (Debian, Ubuntu: sudo apt-get install python3-venv), or without root put uv or a conda's Python on the PATH, and run this again"
fi
echo "setup: installing the Python packages into .venv" >&2
if [[ ! -x .venv/bin/uv ]]; then
  if "$python" -c 'import ensurepip' 2>/dev/null; then "$python" -m venv .venv; .venv/bin/python -m pip install -q uv
  elif command -v uv >/dev/null; then uv venv -q --allow-existing --python "$python" .venv; uv pip install -q --python .venv/bin/python uv
  else "$python" -m venv --without-pip .venv; "$python" -m pip --python .venv/bin/python install -q uv; fi
fi
# uv, because it resolves against the index alone: a stray local torch wheel without a matching torchvision
# cannot be picked up, and the whole set takes seconds.
cache=$(.venv/bin/uv cache dir 2>/dev/null) && mkdir -p "$cache" 2>/dev/null && [[ -w $cache ]] || export UV_NO_CACHE=1
install=(.venv/bin/uv pip install -q --python .venv/bin/python --constraint constraints.txt)
# An earlier setup put a program of its own in the place of torch's torchrun.
! grep -qs scripts/torchrun.py .venv/bin/torchrun || install+=(--reinstall-package torch)
"${install[@]}" --editable ".[$extras]"
if [[ $ffcv ]] && ! { # FFCV builds against the NumPy that is installed.
  "${install[@]}" setuptools wheel && "${install[@]}" --no-build-isolation-package ffcv --editable ".[$extras,ffcv]"
}; then
  [[ $ffcv == found ]] || fail "FFCV could not be compiled (see above); leave --ffcv out: only --loader ffcv needs it"
  left_out="it could not be compiled, see above"
fi
[[ -z $left_out ]] || echo "setup: FFCV, which only --loader ffcv needs, is left out ($left_out)" >&2
echo "setup: compiling the kernels for this machine" >&2
# Python's bytecode too: uv leaves none, and under PYTHONDONTWRITEBYTECODE every later start would compile torch's sources.
export -n PYTHONDONTWRITEBYTECODE
TQDM_DISABLE=1 .venv/bin/python scripts/compile_kernels.py >/dev/null
.venv/bin/python -c 'import eval.report, eval.semisup, train.pretrain
import matplotlib.pyplot, sklearn.manifold, timm, torch._inductor.compile_fx, torch.distributed.run, torch.utils.tensorboard'
rm -f .venv/.setup-*; touch ".venv/.setup-$stamp"

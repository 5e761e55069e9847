#!/usr/bin/env bash
# Sets up everything in a private .venv beside this checkout; running it again costs a second.
#   usage: bash scripts/setup.sh [--dali]        then: source .venv/bin/activate
# Needs Python >= 3.11 (PYTHON=... picks one) and libjpeg-turbo. FFCV is compiled where there are a C++ compiler,
# pkg-config, OpenCV and libjpeg-turbo's headers, and else left out. All that comes through apt where this user may
# install; else one message names what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --dali adds NVIDIA DALI (1.1 GB, seconds to install); once it is there it stays.
extras="test"; if [[ " $* " == *" --dali "* ]] || compgen -G ".venv/lib/python3*/site-packages/nvidia/dali" >/dev/null; then extras="test,dali"; fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "error: $python is $("$python" --version 2>&1 || echo missing), Python 3.11 or newer is expected; set PYTHON=/path/to/python3.11" >&2; exit 2; }

needed=() for_ffcv=()
"$python" -c 'import venv, ensurepip' 2>/dev/null || needed+=(python3-venv)
"$python" -c 'import ctypes; ctypes.CDLL("libturbojpeg.so.0")' 2>/dev/null || needed+=(libturbojpeg0-dev)
command -v g++ >/dev/null        || for_ffcv+=(g++)
command -v pkg-config >/dev/null || for_ffcv+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null      || for_ffcv+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || for_ffcv+=(libturbojpeg0-dev)
"$python" -c 'import sysconfig, pathlib, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || for_ffcv+=(python3-dev)
packages=(${needed[@]+"${needed[@]}"} ${for_ffcv[@]+"${for_ffcv[@]}"}) ffcv=",ffcv"
if ((${#packages[@]})); then
  sudo=(); [[ $EUID -eq 0 ]] || sudo=(sudo -n)
  if command -v apt-get >/dev/null && { [[ $EUID -eq 0 ]] || sudo -n true 2>/dev/null; } && {
    echo "setup: installing ${packages[*]} with apt" >&2
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  }; then :
  elif ((${#needed[@]})); then
    echo "error: the system packages ${needed[*]} are missing; install them (Debian, Ubuntu: sudo apt-get install ${packages[*]}) and run this again" >&2; exit 2
  else
    echo "setup: FFCV is left out (missing: ${for_ffcv[*]}); only --loader ffcv needs it" >&2; ffcv=""
  fi
fi

# The stamp names what was installed from what, so that a second run does nothing and a changed pin does.
stamp=$({ cat constraints.txt pyproject.toml scripts/setup.sh; "$python" --version; echo "$extras$ffcv"; } | sha256sum | cut -d' ' -f1)
[[ -f .venv/.setup-$stamp ]] && exit 0

echo "setup: installing the Python packages into .venv" >&2
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
.venv/bin/python -m pip install -q uv
# uv, because it resolves against the index alone: a stray local torch wheel without a matching torchvision
# cannot be picked up, and the whole set takes seconds. FFCV builds against the NumPy that is installed.
install=(.venv/bin/uv pip install -q --python .venv/bin/python --constraint constraints.txt)
"${install[@]}" numpy setuptools wheel
# An earlier setup put a program of its own in the place of torch's torchrun.
! grep -qs scripts/torchrun.py .venv/bin/torchrun || install+=(--reinstall-package torch)
"${install[@]}" --no-build-isolation-package ffcv --editable ".[$extras$ffcv]" || {
  [[ $ffcv ]] || exit 1
  echo "setup: FFCV could not be built (see above), it is left out; only --loader ffcv needs it" >&2
  "${install[@]}" --editable ".[$extras]"
}
echo "setup: compiling the kernels for this machine" >&2
# Python's bytecode too: uv leaves none, and under PYTHONDONTWRITEBYTECODE every later start would compile torch's sources.
export -n PYTHONDONTWRITEBYTECODE
TQDM_DISABLE=1 .venv/bin/python scripts/compile_kernels.py >/dev/null
.venv/bin/python -c 'import eval.report, eval.semisup, train.pretrain
import matplotlib.pyplot, sklearn.manifold, timm, torch._inductor.compile_fx, torch.distributed.run, torch.utils.tensorboard'
rm -f .venv/.setup-*; touch ".venv/.setup-$stamp"

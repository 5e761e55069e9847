#!/usr/bin/env bash
# Builds a null CUDA runtime, to run this project's GPU code on a machine without a GPU.
#   usage: bash tests/null_cuda/build.sh OUT      then: bash OUT/run COMMAND ...
# torch sees one "H100": device memory is RAM (NULLCUDA_GB=80 limits it), copies are real, kernels do nothing. Shows
# what waits for the GPU, what is illegal while a graph is recorded, and running out of memory; not values or times.
# The headers are CUDA 13's, from Triton 3.9 in PYTHON's packages (.venv's); what is built serves torch 2.11 as well.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); mkdir -p "$1"; out=$(cd "$1" && pwd)
packages=$("${PYTHON:-.venv/bin/python}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
include=$packages/triton/backends/nvidia/include
gcc -c -fPIC "$here/stubs.c" -o "$out/stubs.o"
gcc -shared -fPIC -w -I"$include" "$here/driver.c" "$out/stubs.o" -o "$out/libcuda.so.1"
ln -sf libcuda.so.1 "$out/libcuda.so"
g++ -shared -fPIC -fvisibility=hidden -w -O1 -I"$include" "$here"/*.cpp "$out/stubs.o" -ldl -o "$out/libnullrt.so"
cat > "$out/run" <<R
#!/usr/bin/env bash
export LD_PRELOAD=$out/libnullrt.so LD_LIBRARY_PATH=$out:\${LD_LIBRARY_PATH:-}
export TRITON_LIBCUDA_PATH=$out TRITON_CACHE_DIR=\${TRITON_CACHE_DIR:-$out/triton}
export PYTHONPATH=$here/site\${PYTHONPATH:+:\$PYTHONPATH}
exec "\$@"
R

"""What the view kernels compile to for a GPU, looked at without one: by the installed Triton and by torch 2.11's."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.views import augment_gpu
from tests.audit_kernels import scattered

REPO = Path(__file__).resolve().parents[1]
INSTALLED, OF_TORCH_2_11 = importlib.metadata.version("triton"), "3.6.0"


def run_compiled(*command: str, cache: Path, first: str = "") -> subprocess.CompletedProcess:
    """A Python program in which kernels are not interpreted; the folder `first` comes before installed packages."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, [first, str(REPO)]))}
    return subprocess.run([sys.executable, *command], env=env, cwd=REPO, capture_output=True, text=True)


def folder_with_triton(version: str, cache: pytest.Cache) -> str:
    """Where Triton of this version is, "" for the installed one; fetched once and kept in pytest's cache."""
    if version == INSTALLED:
        return ""
    folder = cache.mkdir("packages") / f"triton-{version}"
    if not folder.is_dir():
        uv, half_done = Path(sys.executable).with_name("uv"), folder.with_name(f"{folder.name}.{os.getpid()}")
        if not uv.is_file():
            pytest.skip(f"Triton {version} has to be fetched, and there is no {uv}; scripts/setup.sh installs it")
        install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", half_done]
        done = subprocess.run([*install, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Triton {version} cannot be fetched: {' '.join(done.stderr.split())[-300:]}")
        half_done.rename(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted({INSTALLED, OF_TORCH_2_11}))
def test_the_machine_code_of_every_kernel(version, cache, tmp_path):
    done = run_compiled("tests/audit_kernels.py", cache=tmp_path, first=folder_with_triton(version, cache))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["triton"] == version
    assert set(found["kernels"]) == set(augment_gpu.SETTINGS), "a kernel that nobody looked at"


BAD_OPTIONS = """
from tests import audit_kernels as audit
audit.augment_gpu.EXACT.update(enable_fp_fusion=True, maxnreg=24)
audit.KERNELS, audit.MOST_REGISTERS = [k for k in audit.KERNELS if k[0].__name__ == "finish_colours"], 20
audit.main()
"""


@pytest.mark.slow
def test_the_audit_finds_what_is_wrong(tmp_path):
    """Multiply-adds fused, and so few registers that some are spilled; still more of them than are allowed."""
    done = run_compiled("-c", BAD_OPTIONS, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout.splitlines()[-1])["wrong"]
    assert [fault.split()[-2] for fault in wrong] == ["fused", "spilled", "registers"], wrong


A_LOAD = """
#blocked = #ttg.blocked<{{sizePerThread = {elements}, threadsPerWarp = {lanes}, warpsPerCTA = [4, 1], order = [1, 0]}}>
    %7 = tt.load %6, %5 : tensor<{shape}x!tt.ptr<i8>, #blocked>
"""


@pytest.mark.parametrize(
    ("shape", "elements", "lanes", "good"),
    [
        ("8x128", [1, 1], [1, 32], True),
        ("32x32", [1, 4], [4, 8], True),
        ("32x32", [4, 1], [8, 4], False),  # lanes down rows, as 3.6 lays them out where the tile is 2-d
        ("32x32", [1, 1], [32, 1], False),
        ("1024", [1], [32], True),
        ("1024", [4], [32], False),  # four elements to a lane, one after the other: a quarter of each access is used
    ],
)
def test_lanes_that_are_not_neighbours_in_memory(shape, elements, lanes, good):
    found = scattered(A_LOAD.format(shape=shape, elements=elements, lanes=lanes))
    assert found == ([] if good else [f"{shape}: {elements} elements, {lanes} lanes"])


ON_THE_CPU = """
import torch
from pipeline.views import augment_gpu, gpu_plan
from pipeline.spec import Normalization
plan = gpu_plan.ViewPlan(torch.empty(0, dtype=torch.int64), 0, 16, 32, 0, 0, -1)
augment_gpu.make_views(torch.empty(0, dtype=torch.uint8), plan, Normalization())
"""


@pytest.mark.slow
def test_compiled_kernels_need_a_gpu(tmp_path):
    done = run_compiled("-W", "error", "-c", ON_THE_CPU, cache=tmp_path)
    assert done.returncode and "need a CUDA device" in done.stderr.splitlines()[-1], done.stderr

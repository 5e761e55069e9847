"""The trainer on a CUDA runtime whose kernels do nothing: what waits, what is illegal, what fits; no values.

The runtime is built from tests/null_cuda; what it shows and what not stands in its build.sh.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import METHOD_NAMES

REPO = Path(__file__).resolve().parents[1]
HEADERS = "triton"  # brings CUDA's headers


@pytest.fixture(scope="module")
def null_cuda(tmp_path_factory) -> Path:
    """The folder in which the runtime was built."""
    missing = [name for name in ("gcc", "g++") if not shutil.which(name)]
    if missing or not importlib.util.find_spec(HEADERS):
        pytest.skip(f"the null CUDA runtime needs gcc, g++ and Triton's headers; missing: {missing or HEADERS}")
    folder = tmp_path_factory.mktemp("null_cuda")
    build = ["bash", str(REPO / "tests" / "null_cuda" / "build.sh"), str(folder)]
    done = subprocess.run(build, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def child(null_cuda: Path, *arguments: str, gigabytes: float = 80) -> tuple[dict, str]:
    """What the child says on a card of so many GB: its answer, and its stderr."""
    command = ["bash", null_cuda / "run", sys.executable, REPO / "tests" / "null_cuda_child.py", *arguments]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(REPO), "NULLCUDA_GB": str(gigabytes), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, cwd=null_cuda)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "graph"])
def test_no_step_waits_for_the_gpu(null_cuda, tmp_path, way):
    """All methods: no synchronization, no number read back, no copy of pageable memory, nothing illegal."""
    found, said = child(null_cuda, "steps", way, str(tmp_path))
    assert set(found) == set(METHOD_NAMES)
    for method, calls in found.items():
        waits = {name: calls[name] for name in ("syncs", "copies_to_host", "pageable_copies", "mallocs", "illegal")}
        assert calls["code"] == 0 and not any(waits.values()), (method, calls, said)
        assert calls["graphs"] == (2 if way == "graph" else 0), method
        assert calls["launches"] < 20 if way == "graph" else calls["launches"] > 500, method


@pytest.mark.slow
def test_the_estimate_is_what_steps_take(null_cuda):
    """ResNet-50, 8192-8192-8192, 1024 images of 224 px, with the blocks' inputs alone: within 80 GB, as counted."""
    found, _ = child(null_cuda, "memory", "blocks", "1024")
    assert 0 <= found["estimate_gb"] - found["peak_gb"] < 0.08 * found["peak_gb"], found
    assert found["peak_gb"] < 45


@pytest.mark.slow
def test_the_default_card_fits_80_gb(null_cuda):
    """By half of the activations: 51 GB were measured once, compiling takes minutes (results/README.md)."""
    found, said = child(null_cuda, "chosen", "512", "1024", "4096")
    assert found == {"512": "all", "1024": "half", "4096": None}, said
    assert "--activations half: about 5" in said


@pytest.mark.slow
def test_what_must_not_happen_is_counted(null_cuda):
    """The counts that the tests above want to be zero are not so where a program does such a thing."""
    found, said = child(null_cuda, "faults")
    assert {"syncs", "copies_to_host"} <= set(found["read back"]), said
    assert found["not pinned"] == ["pageable_copies"]
    assert "illegal" in found["recording"]

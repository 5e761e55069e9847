"""The wheel alone: what it holds, and a whole run from it where no file of the checkout can be opened."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.support import REPO, lend_kernels

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
PACKAGES = ("pipeline", "train", "eval")
SMALL = "--arch resnet10_narrow --projector 32-32 --resolution 32 --global-batch 20 --epochs 2 --workers 1".split()
SYNSETS = ("n01440764", "n02102040")
PER_CLASS = {"train": 20, "val": 10}
# What would point at the checkout, or at machine code kept elsewhere, is not there.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR", "TRITON_INTERPRET")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}

# Every program of the environment begins with this: it ends where it opens a file of the checkout. What the checkout's
# own environment holds are dependencies.
FORBIDDEN = f"""
import sys
def audit(event, args):
    path = args[0] if event == "open" else ""
    if isinstance(path, str) and path.startswith({str(REPO)!r} + "/") and not path.startswith({sys.prefix!r} + "/"):
        raise RuntimeError("a file of the checkout was opened: " + path)
sys.addaudithook(audit)
"""


def ran(*command: object, cwd: Path) -> str:
    """What a command prints on both streams; it has to succeed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without the network, of a copy: setuptools leaves folders of its own beside the code."""
    root = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "LICENSES"):
        shutil.copytree(REPO / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPO / name, root / "source")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    ran(sys.executable, "-m", "pip", "wheel", ".", *offline, "--wheel-dir", root, cwd=root / "source")
    shutil.rmtree(root / "source")
    (path,) = root.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel; what it depends on is read from this environment."""
    root = tmp_path_factory.mktemp("environment")
    ran(sys.executable, "-m", "venv", "--without-pip", root, cwd=root)
    python = root / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--quiet")
    ran(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=root)
    (site,) = root.glob("lib/python3*/site-packages")
    (site / "forbidden.py").write_text(FORBIDDEN)
    (site / "dependencies.pth").write_text(f"import forbidden\n{sysconfig.get_path('purelib')}\n")
    lend_kernels(site)
    return python


@pytest.mark.slow
def test_what_it_holds(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(file.read(metadata).decode())
    held = {name for name in names if ".dist-info/" not in name}
    ours = {p.relative_to(REPO) for package in PACKAGES for p in (REPO / package).rglob("*") if p.is_file()}
    assert held == {str(p) for p in ours if "__pycache__" not in p.parts}
    assert {f"{package}/py.typed" for package in PACKAGES} <= held
    assert about["License-Expression"] == "MIT AND Apache-2.0" and about["Requires-Python"] == ">=3.11"
    for name in about.get_all("License-File"):
        assert metadata.replace("METADATA", f"licenses/{name}") in names
    assert set(about.get_all("License-File")) == {"LICENSE", "NOTICE", "LICENSES/Apache-2.0.txt"}


@pytest.mark.slow
def test_a_run_from_images_to_the_page(python, imagenet_sample, tmp_path):
    """In an empty folder: data and runs are there, and nothing is written beside the installed code."""
    listed = (REPO / "eval/splits/imagenet_10percent.txt").read_text().split()
    photos, images = tmp_path / "photos", iter(imagenet_sample)
    for synset in SYNSETS:
        names = [name for name in listed if name.startswith(synset)][:5] + [
            f"{synset}_99999{i}.JPEG" for i in range(15)
        ]
        names += [f"ILSVRC2012_val_{i}.JPEG" for i in range(PER_CLASS["val"])]
        for number, name in enumerate(names):
            target = photos / ("train" if number < PER_CLASS["train"] else "val") / synset / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(next(images), target)

    site = next(python.parents[1].glob("lib/python3*/site-packages"))
    before = sorted(path.name for path in site.iterdir())
    ran(python, "-m", "pipeline.convert", "--source", photos, "--out", "data/imagenet", cwd=tmp_path)
    ran(python, "-m", "train.pretrain", *SMALL, "--name", "one", cwd=tmp_path)
    assert (tmp_path / "runs/latest").resolve() == tmp_path / "runs/one"
    ran(python, "-m", "eval.knn", "--workers", "1", cwd=tmp_path)
    semisup = ("--fraction", "0.1", "--epochs", "1", "--workers", "1")
    ran(python, "-m", "eval.semisup", *semisup, cwd=tmp_path)
    ran(python, "-m", "eval.report", cwd=tmp_path)

    results = [json.loads(line) for line in (tmp_path / "runs/one/results.jsonl").read_text().splitlines()]
    assert [result["protocol"].split("-")[0] for result in results] == ["knn", "semisup"]
    assert (results[1]["split"], results[1]["train_images"]) == ("imagenet-10percent (10 of 128116 files)", 10)
    page = (tmp_path / "runs/one/report.html").read_text()
    assert "</html>" in page and len(page) > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "data", "runs"}
    assert sorted(path.name for path in site.iterdir()) == before


@pytest.mark.slow
def test_the_checkout_is_out_of_reach(python, tmp_path):
    """What the run above relies on: the guard ends a program, and the types are there for others' programs."""
    code = f"import pipeline.errors as e; print(e.__file__); open({str(REPO / 'pyproject.toml')!r})"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.startswith(str(python.parents[1])) and "a file of the checkout was opened" in done.stderr
    program = "from pipeline.errors import UserError\nreveal_type(UserError('').args)"
    flags = ("--python-executable", python, "--cache-dir", tmp_path / "cache", "-c", program)
    assert "tuple[Any, ...]" in ran(sys.executable, "-m", "mypy", *flags, cwd=tmp_path)


def test_files_about_the_project_agree():
    """One version, the same versions of Python, and lists that are SimCLR's: as NOTICE says, byte for byte."""
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (REPO / "CITATION.cff").read_text()
    assert re.findall(r"^## \[(\d.*)\]", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    workflow = (REPO / ".github/workflows/ci.yml").read_text()
    named = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name}
    assert set(re.findall(r'"(3\.\d+)"', workflow)) == named and "run: bash .ci/run\n" in workflow
    assert min(named) == PROJECT["requires-python"].removeprefix(">=")
    notice = " ".join((REPO / "NOTICE").read_text().split())
    for path in (REPO / "eval/splits").iterdir():
        assert f"{path.relative_to(REPO)} {len(path.read_text().splitlines()):,} file names" in notice

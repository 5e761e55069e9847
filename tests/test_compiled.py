"""Compiled code follows its sources: a change in one file reaches the functions of another that call it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import compiled
from pipeline.compiled import source_digest

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
FIRST = """
import importlib, os, sys
import numba, torch, triton  # what is slow to load, once
from numba.core.registry import CPUDispatcher
for module in sys.argv[1:]:
    if os.fork():
        if os.wait()[1]:
            sys.exit(module)
        continue
    importlib.import_module(module)
    for name, loaded in list(sys.modules.items()):
        functions = vars(loaded).values() if name.startswith("pipeline.") else ()
        for f in functions:
            if isinstance(f, CPUDispatcher) and f.__module__ == name and f._cache.cache_path:
                print(name, f._cache.cache_path, flush=True)
    os._exit(0)
"""
DRAW = """
import numpy as np
from pipeline.choices.draws import draw_views
from pipeline.spec import BARLOW_TWINS_VIEWS
print(draw_views(0, 0, np.arange(1), np.array([300]), np.array([300]), BARLOW_TWINS_VIEWS, 64).hue[0])
"""


@pytest.mark.slow
def test_a_change_in_another_file_is_compiled(tmp_path):
    """draws.py calls the generator of rng.py. Numba alone would go on with the old one: draws.py is unchanged."""
    shutil.copytree(REPO / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))

    def drawn() -> str:
        command = [sys.executable, "-c", "import sys; sys.path.insert(0, '.')\n" + DRAW]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout

    first = drawn()
    assert drawn() == first
    source = tmp_path / "pipeline" / "choices" / "rng.py"
    changed = source.read_text().replace("0x9E3779B9", "0x9E3779B8")
    assert changed != source.read_text()
    source.write_text(changed)
    assert drawn() != first


@pytest.mark.slow
def test_code_lies_in_the_folder_of_its_sources_whatever_is_imported_first():
    """Each module first, in a forked process of its own; those that load torch come to the others through them."""
    sources = {
        ".".join(path.relative_to(REPO).with_suffix("").parts): path.read_text()
        for path in (REPO / "pipeline").rglob("*.py")
    }
    first = [name for name, text in sources.items() if re.search(r"\n@(jit|kernel|compiled)", text)]
    if not importlib.util.find_spec("ffcv"):
        first.remove("pipeline.loaders.ffcv_operation")
    command = [sys.executable, "-c", FIRST, *first]
    done = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {"pipeline.storage.decode", "pipeline.storage.shrink", "pipeline.choices.rng"} <= {
        module for module, _ in lines
    }
    folder = f"numba-{source_digest(REPO / 'pipeline')}"
    assert [line for line in lines if folder not in line[1]] == []


def test_nothing_else_compiles():
    """A decorator of numba's own would put code where no digest names it."""
    files = [path for folder in ("pipeline", "train", "eval", "scripts") for path in (REPO / folder).rglob("*.py")]
    found = [
        path.name for path in files if re.search(r"\b(njit|numba\.(jit|vectorize|guvectorize))\b", path.read_text())
    ]
    assert found == ["compiled.py"]


def test_the_folder_is_where_it_can_be_and_never_another_users(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a read-only place is as good as none")
    places = [tmp_path / "file" / "below", tmp_path / "home", tmp_path / "tmp"]
    monkeypatch.setattr(compiled, "_places", lambda: places)
    assert Path(compiled.cache_folder()).parent == tmp_path / "home"
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    monkeypatch.setattr(compiled.tempfile, "mkdtemp", lambda prefix: f"{prefix}made")
    assert compiled.cache_folder() == "numba-made"


def test_the_digest_depends_on_names_and_contents(tmp_path):
    digests = {source_digest(tmp_path)}
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("b.py", "")):
        (tmp_path / name).write_text(content)
        digests.add(source_digest(tmp_path))
    assert len(digests) == 5


@pytest.mark.parametrize("module", "torch torch._inductor.compile_fx timm torchvision matplotlib sklearn".split())
def test_setup_leaves_bytecode(module):
    """Without it a start under PYTHONDONTWRITEBYTECODE, as in many containers, compiles torch's sources: seconds."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.cached
    assert Path(spec.cached).is_file(), "run scripts/setup.sh"

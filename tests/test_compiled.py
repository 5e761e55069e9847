"""Compiled code follows its sources: a change in one file reaches the functions of another that call it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compiled import source_digest

REPO = Path(__file__).resolve().parents[1]
DRAW = """
import numpy as np
from pipeline.draws import draw_views
from pipeline.spec import BARLOW_TWINS_VIEWS
print(draw_views(0, 0, np.arange(1), np.array([300]), np.array([300]), BARLOW_TWINS_VIEWS, 64).hue[0])
"""


@pytest.mark.slow
def test_a_change_in_another_file_is_compiled(tmp_path):
    """draws.py calls the generator of rng.py. Numba alone would go on with the old one: draws.py is unchanged."""
    shutil.copytree(REPO / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}

    def drawn() -> str:
        command = [sys.executable, "-c", "import sys; sys.path.insert(0, '.')\n" + DRAW]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    first = drawn()
    assert drawn() == first
    source = tmp_path / "pipeline" / "rng.py"
    changed = source.read_text().replace("0x9E3779B9", "0x9E3779B8")
    assert changed != source.read_text()
    source.write_text(changed)
    assert drawn() != first


def test_the_digest_depends_on_names_and_contents(tmp_path):
    digests = {source_digest(tmp_path)}
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("b.py", "")):
        (tmp_path / name).write_text(content)
        digests.add(source_digest(tmp_path))
    assert len(digests) == 5

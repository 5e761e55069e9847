"""The layout's rules: imports flow one way, and no file hides a module when a script beside it runs."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

REPO = Path(__file__).resolve().parents[1]

# What each folder may import, besides itself; a folder that is not named counts to the one above it. Files within a
# folder may import each other, but not in a circle.
GROUND = {"pipeline"}
PIPELINE = GROUND | {"pipeline.choices", "pipeline.storage", "pipeline.views", "pipeline.loaders"}
MAY_IMPORT = {
    "pipeline": GROUND,
    "pipeline.choices": GROUND,
    "pipeline.views": GROUND | {"pipeline.choices"},
    "pipeline.storage": GROUND,
    "pipeline.loaders": PIPELINE,
    "train": PIPELINE,
    "eval": PIPELINE | {"train"},
}
# The files in pipeline/ that users start or call, which stand above its folders.
DOORS = {"pipeline.loader": PIPELINE, "pipeline.preview": PIPELINE}
DOORS |= {"pipeline.convert": GROUND | {"pipeline.choices", "pipeline.storage"}}
ENTRIES = {"pipeline.convert", "pipeline.preview", "train.pretrain"} | {
    f"eval.{name}"
    for name in ("extract", "knn", "linear", "heads", "semisup", "svm", "transfer", "detection", "report")
}
PACKAGES = ("pipeline", "train", "eval")


@functools.cache
def _modules() -> dict[str, Path]:
    files = [p for package in PACKAGES for p in sorted((REPO / package).rglob("*.py")) if p.name != "__init__.py"]
    return {".".join(p.relative_to(REPO).with_suffix("").parts): p for p in files}


def _imports(path: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in _modules()}


def _folder(module: str) -> str:
    """The folder of MAY_IMPORT that a module counts to: the longest that its name begins with."""
    return max((folder for folder in MAY_IMPORT if module.startswith(f"{folder}.")), key=len)


def test_imports_flow_one_way():
    wrong = []
    for module, path in _modules().items():
        allowed = DOORS.get(module, MAY_IMPORT[_folder(module)]) | {_folder(module)}
        for other in _imports(path):
            above = other in ENTRIES or (other in DOORS and module not in DOORS and _folder(module) in PIPELINE)
            if _folder(other) not in allowed or above:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_imports_in_a_circle():
    below = {module: _imports(path) for module, path in _modules().items()}
    while leaves := [module for module, others in below.items() if not others & below.keys()]:
        for module in leaves:
            del below[module]
    assert not below, f"a circle among {sorted(below)}"


def test_no_file_shadows_a_module():
    dependencies = {"torch", "torchvision", "timm", "numba", "numpy", "ffcv", "nvidia", "triton", "PIL", "tyro", "tqdm"}
    dependencies |= {"safetensors", "tensorboard", "sklearn", "matplotlib", "scipy", "pytest", "pycocotools", "jinja2"}
    taken = set(sys.stdlib_module_names) | dependencies | set(PACKAGES)
    scripts = [p for package in (*PACKAGES, "scripts") for p in (REPO / package).rglob("*.py")]
    folders = {p.parent for p in scripts if '__name__ == "__main__"' in p.read_text()}  # first on sys.path, then
    assert {REPO / package for package in (*PACKAGES, "scripts")} <= folders
    files = [p for folder in folders for p in folder.glob("*.py")]
    assert [str(p) for p in files if p.stem in taken] == []


def _names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def test_every_import_is_declared():
    """What is imported where a file begins is a dependency; what a function imports may be an extra."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = _names(project["dependencies"])
    extras = _names([name for names in project["optional-dependencies"].values() for name in names])
    distributions, wrong = importlib.metadata.packages_distributions(), set()
    ours = {path.stem for path in (REPO / "scripts").rglob("*.py")} | {*PACKAGES, "bench"} | sys.stdlib_module_names
    for path in [path for folder in (*PACKAGES, "scripts") for path in (REPO / folder).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - ours:
                given = {name.lower() for name in distributions.get(module, [module])}
                given |= {name for name in extras if name.startswith(f"{module}-")}  # nvidia's is not installed
                if not given & (needed if node in tree.body else needed | extras):
                    wrong.add(f"{path.relative_to(REPO)} imports {module}")
    assert sorted(wrong) == []


def test_every_file_is_in_the_wheel():
    """By setuptools' own search for packages, and pyproject.toml's patterns of data files."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_namespace_packages(str(REPO), **settings["packages"]["find"])
    patterns = ["*.py", *settings["package-data"]["*"]]
    files = [p.relative_to(REPO) for package in PACKAGES for p in (REPO / package).rglob("*") if p.is_file()]
    files = [p for p in files if "__pycache__" not in p.parts]
    assert Path("eval/splits/imagenet_1percent.txt") in files
    left_out = [
        str(p)
        for p in files
        if ".".join(p.parent.parts) not in packages or not any(fnmatch(p.name, pattern) for pattern in patterns)
    ]
    assert left_out == []


def test_no_utils():
    assert [str(p) for p in _modules().values() if "utils" in p.stem] == []


@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_help(entry):
    script = REPO / (entry.replace(".", "/") + ".py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=REPO.parent)
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout or "--source" in done.stdout or "RUN" in done.stdout.upper()

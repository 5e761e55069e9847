"""The layout's rules: imports flow one way, and no file hides a module when a script beside it runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# ARCHITECTURE: the listing is the data flow; a file imports only from files above it.
ORDER = """
pipeline.constants pipeline.command pipeline.disk pipeline.spec pipeline.compiled pipeline.rng pipeline.draws
pipeline.order pipeline.lists pipeline.folders pipeline.sources pipeline.voc pipeline.jpeg pipeline.beton
pipeline.shards pipeline.decode pipeline.bad_images pipeline.plan pipeline.shrink pipeline.any_image pipeline.store
pipeline.beton_writer pipeline.workers pipeline.convert
pipeline.vector_cpu pipeline.resample_cpu pipeline.colour_cpu pipeline.blur_cpu pipeline.augment_cpu
pipeline.resample_gpu pipeline.blur_gpu pipeline.augment_gpu
pipeline.loader_torch pipeline.loader_ffcv pipeline.loader_resident pipeline.loader_dali pipeline.loader
pipeline.preview
train.config train.cards train.distributed train.batchnorm train.model train.together
train.methods.contract train.methods.barlow_twins train.methods.barlow_ablations
train.methods.simclr train.methods.byol train.methods.simsiam train.methods.vicreg train.methods.choose train.lars
train.run_data train.schedule train.knn_vote train.content train.foreign train.checkpoint train.initial
train.agreement train.runstate train.recompute train.memory train.guard train.watchdog train.runlog train.plots
train.online_knn train.recorded train.pretrain
eval.kept eval.features eval.metrics eval.supervised eval.frozen eval.splits eval.subject
eval.extract eval.knn eval.linear eval.heads eval.semisup eval.svm eval.transfer
eval.detection_data eval.detection_model eval.detection_scores eval.detection_train eval.detection
eval.published eval.comparison eval.summary eval.charts eval.page eval.correlation eval.neighbours eval.report
""".split()
ENTRIES = {"pipeline.convert", "pipeline.preview", "train.pretrain"} | {
    f"eval.{name}"
    for name in ("extract", "knn", "linear", "heads", "semisup", "svm", "transfer", "detection", "report")
}
PACKAGES = ("pipeline", "train", "eval")


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


def test_every_module_has_its_place():
    assert set(_modules()) <= set(ORDER), "a new file: give it its place in ORDER"


def test_imports_flow_one_way():
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{name} imports {other}, which stands below it or beside it as an entry point"
        for name, path in _modules().items()
        for other in _imports(path)
        if place[other] >= place[name] or other in ENTRIES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_shadows_a_module():
    dependencies = {"torch", "torchvision", "timm", "numba", "numpy", "ffcv", "nvidia", "triton", "PIL", "tyro", "tqdm"}
    dependencies |= {"safetensors", "tensorboard", "sklearn", "matplotlib", "scipy", "pytest", "pycocotools"}
    taken = set(sys.stdlib_module_names) | dependencies | set(PACKAGES)
    files = [p for folder in (*PACKAGES, "scripts") for p in (REPO / folder).glob("*.py")]
    assert [str(p) for p in files if p.stem in taken] == []


def test_no_utils():
    assert [str(p) for p in _modules().values() if "utils" in p.stem] == []


@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_help(entry):
    script = REPO / (entry.replace(".", "/") + ".py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=REPO.parent)
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout or "--source" in done.stdout or "RUN" in done.stdout.upper()

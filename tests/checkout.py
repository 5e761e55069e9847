"""A copy of the code with real images beside it, in which tests run the commands that the READMEs promise."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.support import REPO, lend_kernels

IMAGES_PER_CLASS = {"train": 16, "val": 4}
CLASSES = 4
SMALL = "--arch resnet18 --projector 32-32-32 --resolution 32 --global-batch 16 --epochs 1 --workers 1"


def make_checkout(root: Path, shared_data: Path) -> Path:
    """A copy of the code alone, with $IMAGENET beside it: a folder of train/ and val/, one folder a class."""
    code = root / "checkout"
    for name in ("pipeline", "train", "eval", "scripts"):
        shutil.copytree(REPO / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    lend_kernels(code)
    (code / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    (code / "inside").mkdir()
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(shared_data / "imagenette-128.tar") as tar:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile() or len(parts) != 4:
                continue
            key = (parts[1], parts[2])
            known = {synset for _, synset in taken}
            if parts[2] not in known and len(known) == CLASSES:
                continue
            if taken.get(key, 0) < IMAGES_PER_CLASS[parts[1]]:
                taken[key] = taken.get(key, 0) + 1
                target = root / "imagenet" / "/".join(parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    assert len(taken) == 2 * CLASSES
    return code


def finished(code: Path, command: str, cwd: str = ".") -> subprocess.CompletedProcess:
    """The command as a user of the checkout types it, in bash with the environment of setup.sh, when it has ended."""
    env = {
        **os.environ,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(code),
        "IMAGENET": str(code.parent / "imagenet"),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("NUMBA_CACHE_DIR", None)  # the machine code that was lent lies beside the copy
    return subprocess.run(["bash", "-c", command], cwd=code / cwd, env=env, capture_output=True, text=True)


def run(code: Path, command: str, cwd: str = ".") -> str:
    """What the command prints on both streams; it has to succeed."""
    done = finished(code, command, cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr

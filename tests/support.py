"""What tests of several areas assert alike, and copies of the code that begin with compiled kernels."""

import shutil
from pathlib import Path

import torch
from numba.core.caching import UserProvidedCacheLocator

from pipeline import compiled
from pipeline.spec import Batch

REPO = Path(__file__).resolve().parents[1]


def lend_kernels(copy: Path) -> None:
    """Gives `copy`/pipeline, the same files, this checkout's machine code: compiling it again takes a minute.

    Numba files it by the path of the source, and takes it if the source has the same size and time.
    """
    for source in (REPO / "pipeline").rglob("*.py"):
        shutil.copystat(source, copy / source.relative_to(REPO))
        kept, own = map(UserProvidedCacheLocator.get_suitable_cache_subpath, (source, copy / source.relative_to(REPO)))
        folder = Path(compiled.cache_folder())
        if (folder / kept).is_dir():
            target = copy / "pipeline" / "__pycache__" / folder.name / own
            shutil.copytree(folder / kept, target, dirs_exist_ok=True)


def assert_same_batch(one: Batch, other: Batch) -> None:
    """The same images, labels and stand-ins at the same place of the run, and views with the same bits and layout."""
    assert (one.step, one.epoch, one.substituted) == (other.step, other.epoch, other.substituted)
    assert torch.equal(one.sample, other.sample) and torch.equal(one.label, other.label)
    for view, same in zip(one.views, other.views, strict=True):
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, same)


def assert_same_batches(ones: list[Batch], others: list[Batch]) -> None:
    """As `assert_same_batch`, of all of them; there has to be one."""
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert_same_batch(one, other)

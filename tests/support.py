"""What tests of several areas assert alike."""

import torch

from pipeline.spec import Batch


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

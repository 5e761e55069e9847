"""Batch norm over groups of a batch, against processes with a batch norm each: values, gradients, statistics."""

import copy

import pytest
import torch
import torch.multiprocessing
from timm.layers import BatchNormAct2d
from torch import nn

from eval.norm_groups import groups_of, norm_groups
from eval.semisup import SemisupConfig, main, require_groups
from pipeline.errors import UserError
from tests.evaluation import AT_SIDE
from tests.plain_norm_processes import EACH, Net, process, trained


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_groups_are_processes_with_a_batch_norm_each(tmp_path, world_size):
    """Three updates with momentum: an error of statistics, gradients or averaging would show in the weights."""
    how = {"nprocs": world_size, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(process, (world_size, str(tmp_path)), **how)
    theirs, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size))
    net = Net()
    with norm_groups(net, EACH):
        ours = trained(net, net, world_size, slice(None))
    net = Net()
    whole = trained(net, net, world_size, slice(None))
    losses = torch.stack([found.pop("loss") for found in (theirs, *others)])
    assert torch.allclose(ours.pop("loss"), losses.mean(), rtol=1e-12)
    assert ours.keys() == theirs.keys() and any("running_var" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name].double(), tensor.double(), rtol=1e-10, atol=1e-13), name
        if "num_batches" not in name:
            assert not torch.allclose(whole[name], tensor, rtol=1e-3), f"{name} decides nothing"


@pytest.mark.parametrize("batch, most, sizes", [(12, 4, [4, 4, 4]), (10, 4, [4, 3, 3]), (3, 4, [3]), (8, 0, [8])])
def test_sizes_of_groups(batch, most, sizes):
    norm, x = (
        nn.BatchNorm2d(2).double(),
        torch.randn(batch, 2, 3, 3, dtype=torch.float64) * torch.arange(1, batch + 1)[:, None, None, None],
    )
    with norm_groups(norm, most):
        ours = norm(x)
        evaluated = norm.eval()(x)
    assert "forward" not in vars(norm) and torch.equal(evaluated, norm(x))
    expected = []
    for part in x.split(sizes):
        mean = part.mean((0, 2, 3), keepdim=True)
        variance = part.var((0, 2, 3), correction=0, keepdim=True)
        expected.append((part - mean) / (variance + norm.eps).sqrt())
    assert torch.allclose(ours, torch.cat(expected), rtol=1e-12)
    first = x[: sizes[0]]
    assert torch.allclose(norm.running_mean, 0.1 * first.mean((0, 2, 3)))
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * first.var((0, 2, 3)))
    assert norm.num_batches_tracked == 1 and norm.track_running_stats
    assert not most or groups_of(batch, most) == len(sizes)


def test_timms_norm_with_its_activation():
    layer, x = BatchNormAct2d(5), torch.randn(6, 5, 4, 4)
    expected = torch.cat([copy.deepcopy(layer)(x[:3]), copy.deepcopy(layer)(x[3:])])
    with norm_groups(nn.Sequential(layer), 3):
        assert torch.equal(layer(x), expected) and expected.min() >= 0


def test_a_group_of_one_image_is_refused(run):
    for batch, images in ((256, 1), (256, -1), (3, 2)):
        with pytest.raises(UserError, match=f"--norm-images {images} was given with {batch} images a step"):
            require_groups(batch, images)
    for batch, images in ((256, 32), (2, 32), (5, 3), (2, 0)):
        require_groups(batch, images)
    with pytest.raises(UserError, match="--norm-images 1 was given with 20 images"):
        main(SemisupConfig(checkpoint=run, fraction=0.1, epochs=1, norm_images=1))


def test_the_flag_changes_the_training_and_the_protocols_name(run):
    flags = {"checkpoint": run, "fraction": 0.2, "epochs": 1, "lr_backbone": 0.02, "batch": 40}
    published, whole = main(SemisupConfig(**flags)), main(SemisupConfig(**flags, norm_images=0))
    assert published["changed"] == {"epochs": 1, "lr_backbone": 0.02, "batch": 40} | AT_SIDE
    assert whole["changed"] == published["changed"] | {"norm_images": 0}
    assert whole["values"]["final_loss"] != published["values"]["final_loss"]

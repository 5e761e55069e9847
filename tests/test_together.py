"""Both views in one pass: the update of one pass a view, in float64, for every method; compiled in one piece."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.test_ablations import ABLATIONS
from tests.test_resume import run
from train.batchnorm import CrossRankBatchNorm
from train.cards import PRESETS
from train.checkpoint import read_checkpoint
from train.config import METHOD_NAMES
from train.flags import resolved
from train.lars import LARS
from train.methods.choose import make_method
from train.methods.contract import keep_views_apart
from train.model import make_backbone

HEADS = {"byol": ("24-16", "24-16"), "simsiam": ("24-16", "8-16")}


def stepped(name: str, together: bool, steps: int = 3) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and statistics after some steps of a small ResNet, float64, and the losses."""
    flags = ABLATIONS.get(name, {})
    card = PRESETS["cifar10-demo" if flags or name == "barlow_twins" else f"cifar10-demo-{name}"]
    projector, predictor = HEADS.get(name, ("24-16", ""))
    flags = {"predictor": predictor} | flags | {"predictor": "7-16" if "predictor" in flags else predictor}
    config = resolved(replace(card, projector=projector, run="x", views_together=together, **flags))
    torch.manual_seed(0)
    method = make_method(*make_backbone("resnet10_narrow"), config).double()
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # no block is left out at the start
    if together:
        keep_views_apart(method)
    optimizer = LARS(method.parameter_groups(), eta=0.02)
    losses = []
    for step in range(steps):
        views = [torch.randn(6, 3, 16, 16, dtype=torch.float64) + shift for shift in (0, 1)]
        loss, _ = method(views)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step, steps)
        losses.append(loss.item())
    return method.state_dict(), losses


@pytest.mark.parametrize("name", [*METHOD_NAMES, "predictor", "cross-entropy"])
def test_the_same_update(name):
    apart, losses = stepped(name, False)
    together, theirs = stepped(name, True)
    assert theirs == pytest.approx(losses, rel=1e-11)
    assert list(together) == list(apart)
    for key, value in apart.items():
        torch.testing.assert_close(together[key], value, rtol=1e-11, atol=1e-12, msg=key)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, CrossRankBatchNorm])
def test_compiled_in_one_piece(norm):
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU()).double()
    method = nn.ModuleDict({"backbone": network})
    method.TOGETHER = ("backbone",)
    keep_views_apart(method)
    copied = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), copied(x))
    torch.testing.assert_close(network[1].running_mean, copied[1].running_mean)
    assert network[1].num_batches_tracked == copied[1].num_batches_tracked == 2
    torch.testing.assert_close(network.eval()(x[:3]), copied.eval()(x[:3]))
    torch._dynamo.reset()


def test_a_whole_run(tmp_path, monkeypatch):
    """Through the trainer, in float32; and it may be resumed either way."""
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    for together in (False, True):
        run(tmp_path / str(together), epochs=1, views_together=together)
    apart, both = (read_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("False", "True"))
    distance = sum((both[n] - w).double().square().sum() for n, w in apart.items())
    assert distance.sqrt() < 1e-3 * sum(w.double().square().sum() for w in apart.values()).sqrt()
    assert run(tmp_path / "True", epochs=1, views_together=False) == 0

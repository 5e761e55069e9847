"""Five heads on one pass of a frozen ResNet: the published sizes, and nothing of the encoder moves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval import heads, supervised
from eval.features import Encoder, open_encoder
from eval.frozen import OUTPUT, POOLS, NormalizedHeads, StageFeatures, pool_map, stage_encoder
from eval.heads import HeadsConfig, main
from eval.subject import open_subject
from pipeline.errors import UserError
from tests.evaluation import AT_SIDE, NORMALIZATION
from train.checkpoint import BackboneInfo
from train.model import make_backbone

CHANCE = 20.0
DIMENSIONS = {"feature1": 9216, "feature2": 9216, "feature3": 8192, "feature4": 9216, "feature5": 8192}


def windows_mean(image: np.ndarray, window: int, stride: int, padding: int) -> np.ndarray:
    """Average pooling in float64 by loops; zeros around the map count."""
    padded = np.pad(image.astype(np.float64), ((0, 0), (padding, padding), (padding, padding)))
    starts = range(0, padded.shape[1] - window + 1, stride)
    return np.array(
        [[padded[:, y : y + window, x : x + window].mean((1, 2)) for x in starts] for y in starts]
    ).transpose(2, 0, 1)


@pytest.mark.slow
def test_resnet50_at_224_px_gives_the_published_sizes():
    torch.manual_seed(0)
    backbone = make_backbone("resnet50")[0].eval()
    extract, image = StageFeatures(backbone).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = extract(image)
        x = backbone.relu(backbone.bn1(backbone.conv1(image)))
        stages = [x]
        x = backbone.maxpool(x)
        for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            x = layer(x)
            stages.append(x)
    assert extract.published
    assert {name: made.numel() for name, made in maps.items()} == DIMENSIONS
    heads = NormalizedHeads({name: tuple(made.shape[1:]) for name, made in maps.items()}, 7, 0, affine=False)
    assert {name: head.in_features for name, head in heads.heads.items()} == DIMENSIONS
    # Window, stride, padding: RECIPE's, written down a second time.
    pools = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]
    for stage, pool, made in zip(stages, pools, maps.values(), strict=True):
        expected = windows_mean(stage[0].numpy(), *pool)
        assert np.allclose(made[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_each_stage_of_a_resnet_as_features():
    """VISSL's pools of conv1 (behind its ReLU), res2 … res5, written out; and one network for all of them."""
    backbone = make_backbone("resnet18")[0].eval()
    info = BackboneInfo("resnet18", "imagenet", 512, 224, NORMALIZATION, "", 0, 9)
    encoder = Encoder("trained", backbone, info, "cpu")
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conv1 = F.relu(backbone.bn1(backbone.conv1(images)))
        res2 = backbone.layer1(F.max_pool2d(conv1, 3, 2, 1))
        res3 = backbone.layer2(res2)
        res4 = backbone.layer3(res3)
        res5 = backbone.layer4(res4)
        expected = {
            "feature1": F.avg_pool2d(conv1, 10, 10, 4),
            "feature2": F.avg_pool2d(res2, 16, 8),
            "feature3": F.avg_pool2d(res3, 13, 5),
            "feature4": F.avg_pool2d(res4, 8, 3),
            "feature5": F.avg_pool2d(res5, 6, 1),
            "output": res5.mean((2, 3)),
        }
        for name, pooled in expected.items():
            at_stage = stage_encoder(encoder, name)
            made = at_stage.module(images)
            assert torch.allclose(made, pooled.flatten(1), atol=1e-5) and at_stage.info.features == made.shape[1]
            assert at_stage.stage == ("" if name == OUTPUT else name)
        several = StageFeatures(backbone, ("feature4", "output", "feature1"))(images)
    assert list(several) == ["feature4", "output", "feature1"], "in the order that was asked for"
    assert several["output"].shape == (1, 512, 1, 1) and torch.equal(several["output"].flatten(1), backbone(images))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_vissls_head():
    """Batch norm of the channels with weights, flattened, linear; all of it with torch's own initial values."""
    maps = torch.randn(9, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 4 + 2
    ours = NormalizedHeads({"feature5": (3, 2, 2)}, 4, 7, affine=True)
    torch.manual_seed(7)
    theirs = nn.Sequential(nn.BatchNorm2d(3, eps=1e-5, momentum=0.1), nn.Flatten(), nn.Linear(12, 4))
    for _ in range(2):  # the running statistics too
        assert torch.equal(ours({"feature5": maps})["feature5"], theirs(maps))
    assert torch.equal(ours.eval()({"feature5": maps})["feature5"], theirs.eval()(maps))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 3 + 3 + 48 + 4


def test_other_maps_are_pooled_to_the_same_grid_or_left():
    assert pool_map(POOLS["feature2"], torch.rand(2, 3, 20, 20)).shape == (2, 3, 6, 6)
    small = torch.rand(2, 3, 4, 4)
    assert torch.equal(pool_map(POOLS["feature2"], small), small)


def test_a_transformer_has_no_stages():
    with pytest.raises(UserError, match="has no stem and four stages"):
        StageFeatures(make_backbone("test_vit")[0])
    vit = make_backbone("test_vit")[0].eval()
    images = torch.randn(2, 3, 32, 32)
    (output,) = StageFeatures(vit, ("output",))(images).values()
    assert torch.equal(output, vit(images)[:, :, None, None])


def test_batch_norm_without_weights_then_a_linear_classifier():
    maps = {"feature4": torch.randn(16, 3, 2, 2) * 5 + 1}
    heads = NormalizedHeads({"feature4": (3, 2, 2)}, 4, 1, affine=False).train()
    mean = maps["feature4"].double().mean((0, 2, 3), keepdim=True)
    deviation = (maps["feature4"].double().var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    head = heads.heads["feature4"]
    expected = ((maps["feature4"] - mean) / deviation).flatten(1) @ head.weight.double().T
    assert torch.allclose(heads(maps)["feature4"].double(), expected, atol=1e-5)
    assert [name for name, _ in heads.named_parameters()] == ["heads.feature4.weight", "heads.feature4.bias"]
    assert 0.005 < head.weight.std() < 0.015


@pytest.mark.slow
def test_the_encoder_stays_bit_for_bit_while_every_stage_learns(run, monkeypatch):
    subjects = []
    monkeypatch.setattr(heads, "open_subject", lambda *a: subjects.append(open_subject(*a)) or subjects[-1])
    before = open_encoder(run).module.state_dict()
    result = main(HeadsConfig(checkpoint=run, epochs=8, batch=50, validate_every=8))
    after = subjects[0].encoder.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "batch-norm statistics included"
    assert (result["protocol"], result["metric"]) == ("heads-mmselfsup-modified", "feature5_top1")
    assert result["changed"] == {"epochs": 8, "batch": 50, "pooling": "adaptive"} | AT_SIDE
    assert all(result["values"][f"{name}_top1"] > 1.5 * CHANCE for name in DIMENSIONS)
    assert result["value"] == result["values"]["feature5_top1"]
    assert list(result["details"]["dimensions"]) == list(DIMENSIONS)


def test_untouched_settings_are_the_published_ones(run, monkeypatch):
    seen = {}

    def watch(model, groups, stream, validation, epochs, steps, nesterov, validate_every):
        seen.update(groups=groups, epochs=epochs, steps=steps, nesterov=nesterov)
        return []

    monkeypatch.setattr(supervised, "fit", watch)
    monkeypatch.setattr(heads, "final_scores", lambda *_: {"top1": 0.0, "top5": 0.0})
    result = main(HeadsConfig(checkpoint=run, resolution=224))
    (group,) = seen["groups"]
    assert (group.lr, group.weight_decay, group.milestones) == (0.01, 1e-4, (30, 60))
    assert (seen["epochs"], seen["steps"], seen["nesterov"]) == (90, 1, True)  # 200 images are one batch
    assert (result["protocol"], result["changed"]) == ("heads-mmselfsup", {}), "as published at 224 px"
    assert main(HeadsConfig(checkpoint=run))["changed"] == {"pooling": "adaptive"} | AT_SIDE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"features": "pixels"}, "has no stages"),
        ({"batch": 1}, "at least 2 are needed for batch norm"),
        ({"validate_every": 0}, "--validate-every 0 was given"),
    ],
)
def test_bad_flags(run, flags, message):
    with pytest.raises(UserError, match=message):
        main(HeadsConfig(checkpoint=run, **flags))

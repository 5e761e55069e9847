"""Five heads on one pass of a frozen ResNet: the published sizes, and nothing of the encoder moves."""

import numpy as np
import pytest
import torch

from eval import heads, supervised
from eval.features import open_encoder
from eval.frozen import POOLS, NormalizedHeads, StageFeatures, pool_map
from eval.heads import HeadsConfig, main
from eval.subject import open_subject
from pipeline.errors import UserError
from tests.evaluation import AT_SIDE
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


def test_other_maps_are_pooled_to_the_same_grid_or_left():
    assert pool_map(POOLS["feature2"], torch.rand(2, 3, 20, 20)).shape == (2, 3, 6, 6)
    small = torch.rand(2, 3, 4, 4)
    assert torch.equal(pool_map(POOLS["feature2"], small), small)


def test_a_transformer_has_no_stages():
    with pytest.raises(UserError, match="has no stem and four stages"):
        StageFeatures(make_backbone("test_vit")[0])


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

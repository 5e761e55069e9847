"""The comparison with lightly: both sides make the same updates, a stopped run continues, the table is the records'."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.spec import SOLARIZE_THRESHOLD
from scripts.bench import rival, rival_table

SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """64 and 32 images of 2 classes as folders, and converted."""
    root, noise = tmp_path_factory.mktemp("rival"), np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 32)):
        for i in range(count):
            path = root / "images" / split / f"class_{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    convert(ConvertConfig(source=root / "images", out=root / "data", workers=1))
    return root


@pytest.fixture
def config(folder, tmp_path, monkeypatch) -> rival.RivalConfig:
    recipe = rival.pretrain_config
    monkeypatch.setattr(rival, "pretrain_config", lambda c: replace(recipe(c), global_batch=32, projector="24-16"))
    monkeypatch.setattr(rival, "KNN_EVERY", 1)
    return rival.RivalConfig(folder / "images", tmp_path / "out", data=folder / "data", epochs=2, seed=SEED)


def test_both_make_the_same_updates_of_the_same_views(config):
    """The loss and its gradient; then an epoch. Where the two LARS differ is left out: weights without a gradient, as
    those before a batch norm that begins at 0, and a decay that is not small beside the gradient."""
    recipe = replace(rival.pretrain_config(config), weight_decay=1e-9)
    ours, theirs, start_s = rival.made_sides(recipe, config.images)
    assert start_s.keys() == rival_table.SIDES.keys() and min(start_s.values()) > 0
    one, other = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for loss in (lambda *z: ours.update.method.loss(*z)[0], theirs.criterion):
        z = [x.clone().requires_grad_() for x in (one, other)]
        value = loss(*z)
        found.append((value, *torch.autograd.grad(value, z)))
    for own, lightlys in zip(*found, strict=True):
        torch.testing.assert_close(own, lightlys, rtol=1e-4, atol=1e-5)

    for backbone in (ours.backbone, theirs.backbone):
        for name, module in backbone.named_modules():
            if name.endswith("bn2"):
                torch.nn.init.ones_(module.weight)
    before = [p.clone() for p in theirs.network.parameters()]
    theirs.loader = [(list(batch.views), batch.label) for batch in ours.loader.epoch(0)]
    assert theirs.train(0) == pytest.approx(ours.train(0), rel=1e-3)
    own = [*ours.backbone.parameters(), *ours.update.method.projector.parameters()]
    for start, p, q in zip(before, own, theirs.network.parameters(), strict=True):
        assert (p - q).norm() <= 0.02 * (p - start).norm() + 1e-6
    ours.loader.close()


def test_lightlys_views_are_drawn_from_the_same_distribution(config):
    """What its transforms say of themselves, after the rows of ours."""
    ours, theirs, _ = rival.made_sides(rival.pretrain_config(config), config.images)
    rows, normalize = ours.loader.config.rows, ours.loader.config.normalization
    for row, view in zip(rows, theirs.loader.dataset.transform.transforms, strict=True):
        crop, flip, upside_down, turn, jitter, grey, blur, solarize, _, normal = view.transform.transforms
        assert (crop.size, crop.scale) == ((32, 32), row.area)
        assert InterpolationMode(crop.interpolation) == InterpolationMode(row.interpolation)
        assert tuple(crop.ratio) == row.ratio and (upside_down.p, turn.prob) == (0, 0)
        assert (flip.p, jitter.p, grey.p) == (row.p_flip, row.p_jitter, row.p_grey)
        (colours,) = jitter.transforms
        for name in ("brightness", "contrast", "saturation"):
            assert getattr(colours, name) == pytest.approx((1 - getattr(row, name), 1 + getattr(row, name)))
        assert colours.hue == (-row.hue, row.hue) and blur.prob == row.p_blur == 0
        assert (solarize.prob, solarize.threshold) == (row.p_solarize, SOLARIZE_THRESHOLD)
        assert (tuple(normal.mean), tuple(normal.std)) == (normalize.mean, normalize.std)
    ours.loader.close()


def test_a_stopped_run_continues(config, monkeypatch, capsys):
    """Ours with the bits of one that was not stopped; seconds and accuracies of before the stop stay."""
    rival.main(config)
    whole = torch.load(config.out / f"seed-{SEED}.pt", weights_only=True)
    stopped = replace(config, out=config.out.with_name("stopped"))
    train = rival.Theirs.train
    monkeypatch.setattr(rival.Theirs, "train", lambda side, epoch: {0: train}[epoch](side, epoch))
    with pytest.raises(KeyError):
        rival.main(stopped)
    before = torch.load(stopped.out / f"seed-{SEED}.pt", weights_only=True)["record"]
    monkeypatch.setattr(rival.Theirs, "train", train)
    rival.main(stopped)
    state = torch.load(stopped.out / f"seed-{SEED}.pt", weights_only=True)
    for name, weight in whole["ours"]["model"].items():
        assert torch.equal(weight, state["ours"]["model"][name])
    record = json.loads((stopped.out / f"seed-{SEED}.json").read_text())
    for part, length in (("seconds", 2), ("loss", 2), ("knn", 3)):
        for name in rival_table.SIDES:
            assert len(before[part][name]) == length - 1
            assert record[part][name][:-1] == before[part][name] and len(record[part][name]) == length
    assert record["knn"]["ours"][0] == record["knn"]["theirs"][0]  # the same network
    assert record["loss"]["ours"] == whole["record"]["loss"]["ours"] and record["start_s"] == before["start_s"]
    assert state["theirs"]["schedule"]["last_epoch"] == 4 and len(state["theirs"]["optimizer"]["state"]) > 10
    assert (stopped.out / "curves.png").stat().st_size > 1000
    assert (stopped.out / "table.md").read_text() in capsys.readouterr().out

    with pytest.raises(UserError, match=r"seed-3.json is of a run with another epochs; give the same flags or another"):
        rival.main(replace(stopped, epochs=3, seed=4))
    other = config.out.with_name("other")
    convert(ConvertConfig(source=stopped.images / "val", out=other / "train.beton", workers=1))
    with pytest.raises(UserError, match="of a run with another images_sha256"):
        rival.main(replace(stopped, data=other))
    monkeypatch.setattr(rival, "run", None)  # a finished one is not run again
    rival.main(stopped)


def test_user_errors(config, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--epochs 0 was given, at least 1"):
        rival.main(replace(config, epochs=0))
    with pytest.raises(UserError, match=r"no train.beton in .*; make it with pipeline/convert.py"):
        rival.main(replace(config, data=tmp_path))
    with pytest.raises(UserError, match=r"has 64 images, --images .* 32; convert these again"):
        rival.main(replace(config, images=config.images / "val"))
    monkeypatch.setattr(rival, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lightly is not installed; `pip install lightly`"):
        rival.main(config)


def test_the_table_says_what_the_records_say():
    """By hand: ours is at 40 % after 5 + 10 · 2 s, lightly's, measured at 30 and 50 %, half way from 35 to 75 s."""
    record = {
        "start_s": {"ours": 5.0, "theirs": 15.0},
        "seconds": {"ours": [2.0] * 10, "theirs": [4.0] * 5 + [8.0] * 5},
        "knn": {"ours": [[0, 20.0], [5, 35.0], [10, 40.0]], "theirs": [[0, 20.0], [5, 30.0], [10, 50.0]]},
    }
    found = rival_table.summary(record)
    assert found["knn_top1"] == {"ours": 40.0, "theirs": 50.0} and found["both_reach"] == 40.0
    assert found["seconds_to_it"] == pytest.approx({"ours": 25.0, "theirs": 55.0})
    assert found["to_it_faster"] == pytest.approx(2.2)
    pairs = np.array([2.0] * 5 + [4.0] * 5)
    half = 2.262 * pairs.std(ddof=1) / np.sqrt(10)  # Student's t for nine degrees of freedom
    assert found["epoch_faster"] == {"mean": 3.0, "ci95": pytest.approx(half, abs=1e-3)}
    assert rival_table.seconds_to(record, "ours", 10.0) == 5.0  # had from the start
    header, rule, row = rival_table.table({0: record}).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 11
    assert row == "| 0 | 40.00 | 50.00 | 2.00 ± 0.00 | 6.00 ± 1.51 | 3.00 ± 0.75 | 40.00 | 25 | 55 | 2.20 |"

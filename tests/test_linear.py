"""Linear evaluation: nothing of the encoder moves, and both protocols say which they are."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eval import linear, supervised
from eval.features import FeatureSet, open_encoder
from eval.linear import LinearConfig, main, standardize_
from eval.subject import open_subject, read_results
from pipeline.errors import UserError
from pipeline.storage.beton import open_beton
from tests.evaluation import AT_SIDE

CHANCE = 20.0


@pytest.fixture
def opened(monkeypatch):
    """The subjects that `main` opens, to look at afterwards."""
    subjects = []

    def keep(*args):
        subjects.append(open_subject(*args))
        return subjects[-1]

    monkeypatch.setattr(linear, "open_subject", keep)
    return subjects


@pytest.mark.parametrize("cached", [False, True])
def test_the_encoder_stays_bit_for_bit(run, opened, cached):
    before = open_encoder(run).module.state_dict()
    file = (run / "checkpoint.pt").read_bytes()
    main(LinearConfig(checkpoint=run, cached=cached, epochs=2, batch=50))
    after = opened[0].encoder.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "batch-norm statistics included"
    assert not opened[0].encoder.module.training
    assert all(p.grad is None for p in opened[0].encoder.module.parameters())
    assert (run / "checkpoint.pt").read_bytes() == file


def test_published_protocol_learns_on_fresh_crops(run):
    result = main(LinearConfig(checkpoint=run, epochs=12, batch=50, lr=3.0))
    assert result["protocol"] == "linear-bt-modified"
    assert result["changed"] == {"epochs": 12, "batch": 50, "lr": 3.0} | AT_SIDE
    assert result["value"] > 2 * CHANCE


def test_cached_protocol_agrees_with_a_solver(run, data):
    """SGD on the kept features ends near scikit-learn's logistic regression on the same standardized features."""
    result = main(LinearConfig(checkpoint=run, cached=True))
    assert (result["protocol"], result["changed"]) == ("linear-cached-modified", AT_SIDE)
    encoder = open_encoder(run)
    train, val = (open_beton(data / f"{split}.beton") for split in ("train", "val"))
    x, v = (FeatureSet(encoder, b, run / "features").read().double().numpy() for b in (train, val))
    alive = x.std(0) > 0
    x, v = x[:, alive], v[:, alive]
    mean, deviation = x.mean(0), x.std(0)
    solver = LogisticRegression(max_iter=5000).fit((x - mean) / deviation, train.labels)
    expected = 100 * solver.score((v - mean) / deviation, val.labels)
    assert expected > 2 * CHANCE
    assert abs(result["value"] - expected) <= 10  # 6 of 60 images


def test_same_command_same_number_and_the_kept_features_stay(run):
    first = main(LinearConfig(checkpoint=run, cached=True, epochs=3))
    kept = {path: path.read_bytes() for path in (run / "features").iterdir()}
    second = main(LinearConfig(checkpoint=run, cached=True, epochs=3))
    assert first["values"] == second["values"]
    assert kept == {path: path.read_bytes() for path in (run / "features").iterdir()}
    assert len(kept) == 2
    assert len(read_results(run)) == 2


def test_untouched_settings_are_the_published_ones(run, monkeypatch):
    """The published protocol without a flag: what reaches the loop."""
    seen = {}

    def watch(model, groups, stream, validation, epochs, steps, may_diverge):
        assert not may_diverge
        seen.update(epochs=epochs, steps=steps, groups=groups, weights=copy.deepcopy(model.state_dict()))
        return []

    monkeypatch.setattr(supervised, "fit", watch)
    monkeypatch.setattr(linear, "final_scores", lambda *_: {"top1": 0.0})
    result = main(LinearConfig(checkpoint=run, resolution=224))
    assert (result["protocol"], result["changed"]) == ("linear-bt", {})
    assert (seen["epochs"], seen["steps"]) == (100, 1)  # 200 images are one batch
    (group,) = seen["groups"]
    assert (group.lr, group.weight_decay, group.milestones) == (0.3, 1e-6, ())
    assert len(group.params) == 2
    assert 0.008 < seen["weights"]["heads.linear.weight"].std() < 0.012


def test_fraction_limits_the_labels(run):
    result = main(LinearConfig(checkpoint=run, cached=True, fraction=0.1, epochs=2))
    assert (result["train_images"], result["split"], result["fraction"]) == (20, "balanced-0.1-seed0", 0.1)


def test_raw_pixels_need_the_cached_protocol(run):
    with pytest.raises(UserError, match="--features pixels was given without --cached"):
        main(LinearConfig(checkpoint=run, features="pixels"))
    result = main(LinearConfig(checkpoint=run, features="pixels", cached=True))
    assert result["encoder"] == "raw pixels"
    assert result["value"] > 2 * CHANCE


@pytest.mark.parametrize("flag", ["epochs", "batch"])
def test_settings_that_cannot_train(run, flag):
    with pytest.raises(UserError, match=f"--{flag} 0 was given, at least 1"):
        main(LinearConfig(checkpoint=run, cached=True, **{flag: 0}))


def test_standardized_features_have_length_one_on_average():
    random = np.random.default_rng(0)
    train = torch.from_numpy(random.normal(5, 30, (400, 16))).float()
    train[:, 3] = 7.0
    val = train[:10].clone()
    standardize_(train, val)
    assert torch.allclose(train.mean(0), torch.zeros(16), atol=1e-5)
    assert (train**2).sum(1).mean().item() == pytest.approx(15 / 16, rel=1e-4)
    assert not train[:, 3].any()
    assert torch.equal(val, train[:10])


def test_a_collapsed_encoder_scores_chance():
    train, val = torch.ones(40, 6), torch.ones(10, 6)
    standardize_(train, val)
    assert not train.any() and not val.any()


def test_a_missing_run(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere; make one with"):
        main(LinearConfig(checkpoint=tmp_path / "nowhere"))


# ---- MMSelfSup's AvgPool, and the sweep ----


def test_avgpool_is_the_published_protocol(run, monkeypatch):
    seen = {}

    def watch(model, groups, stream, validation, epochs, steps, may_diverge):
        seen.update(epochs=epochs, groups=groups)
        return []

    monkeypatch.setattr(supervised, "fit", watch)
    monkeypatch.setattr(linear, "final_scores", lambda *_: {"top1": 0.0})
    result = main(LinearConfig(checkpoint=run, protocol="avgpool", feature_type="float16"))
    assert result["protocol"] == "linear-avgpool-modified"
    assert result["changed"] == AT_SIDE | {"feature_type": "float16"}, "and nothing else"
    (group,) = seen["groups"]
    assert (seen["epochs"], group.lr, group.weight_decay, group.milestones) == (100, 30.0, 0.0, (60, 80))
    with pytest.raises(UserError, match="--cached is a protocol of its own"):
        main(LinearConfig(checkpoint=run, protocol="avgpool", cached=True))


def test_a_sweep_reports_every_head_and_the_held_out_tenth_chooses(run):
    grid = {"sweep_lr": (3.0, 0.001), "sweep_weight_decay": (0.0, 0.1)}
    result = main(LinearConfig(checkpoint=run, cached=True, sweep=True, epochs=5, batch=30, **grid))
    assert result["protocol"] == "linear-cached-sweep-modified"
    assert result["changed"] == {"epochs": 5, "batch": 30, "lr": [0.001, 3.0], "weight_decay": [0.0, 0.1]} | AT_SIDE
    points = result["details"]["sweep"]
    assert [(p["lr"], p["weight_decay"]) for p in points] == [(0.001, 0.0), (0.001, 0.1), (3.0, 0.0), (3.0, 0.1)]
    assert len({p["top1"] for p in points}) > 1, "the case decides nothing"
    best = max(points, key=lambda p: p["held_out_top1"])
    assert result["value"] == best["top1"] and result["values"]["lr"] == best["lr"]
    assert result["train_images"] == 180 and result["split"] == "all without 20 held out"


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_head_that_diverges_leaves_the_others_alone(run, cached, opened):
    """The head of learning rate 0.3 is bit for bit the one that trains alone, beside one that is lost."""
    decay = {"sweep_weight_decay": (1e-4,)}  # × 1e30 it overflows in the second step
    results = [
        main(LinearConfig(checkpoint=run, cached=cached, sweep=True, epochs=2, batch=60, sweep_lr=rates, **decay))
        for rates in ((0.3,), (0.3, 1e30))
    ]
    (alone,), (beside, lost) = (result["details"]["sweep"] for result in results)
    assert beside == alone
    assert lost["top1"] == lost["held_out_top1"] == 0
    assert results[0]["values"] == results[1]["values"]
    assert not opened[0].encoder.module.training


def test_held_out_images_train_nothing(run, data):
    subject = open_subject(LinearConfig(checkpoint=run, fraction=0.5))
    training, choosing = linear.held_out(subject)
    assert set(training.ids) | set(choosing.ids) == set(subject.subset.ids)
    assert not set(training.ids) & set(choosing.ids)
    assert np.bincount(open_beton(data / "train.beton").labels[choosing.ids]).tolist() == [2] * 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": 1.0}, "use --sweep-lr"),
        ({"sweep_weight_decay": ()}, "--sweep-weight-decay was given without a value"),
        ({"shots": 1}, "a class has 1 labelled"),
        ({"sweep_lr": (1e30,), "sweep_weight_decay": (1e-4,), "batch": 60}, "learning rates"),
    ],
)
def test_sweeps_that_cannot_be(run, flags, message):
    with pytest.raises(UserError, match=message):
        main(LinearConfig(checkpoint=run, cached=True, sweep=True, epochs=2, **flags))
    assert not (run / "results.jsonl").exists()

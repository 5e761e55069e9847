"""Linear evaluation: nothing of the encoder moves, and both protocols say which they are."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eval import linear
from eval.features import features_of, open_encoder
from eval.linear import LinearConfig, main, standardize_
from eval.subject import open_subject, read_results
from pipeline.beton import open_beton
from pipeline.command import UserError
from tests.evaluation import write_dataset, write_run

CHANCE = 20.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("coloured"))


@pytest.fixture
def run(data, tmp_path):
    return write_run(tmp_path / "run", data)


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
    assert result["changed"] == {"epochs": 12, "batch": 50, "lr": 3.0}
    assert result["value"] > 2 * CHANCE


def test_cached_protocol_agrees_with_a_solver(run, data):
    """SGD on the kept features ends near scikit-learn's logistic regression on the same standardized features."""
    result = main(LinearConfig(checkpoint=run, cached=True))
    assert (result["protocol"], result["changed"]) == ("linear-cached", {})
    encoder = open_encoder(run)
    train, val = (open_beton(data / f"{split}.beton") for split in ("train", "val"))
    x, v = (features_of(encoder, b, run / "features").double().numpy() for b in (train, val))
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

    def watch(model, groups, stream, validation, epochs, steps):
        seen.update(epochs=epochs, steps=steps, groups=groups, weights=copy.deepcopy(model.state_dict()))
        return []

    monkeypatch.setattr(linear, "fit", watch)
    monkeypatch.setattr(linear, "final_scores", lambda *_: {"top1": 0.0})
    result = main(LinearConfig(checkpoint=run))
    assert (result["protocol"], result["changed"]) == ("linear-bt", {})
    assert (seen["epochs"], seen["steps"]) == (100, 1)  # 200 images are one batch
    (group,) = seen["groups"]
    assert (group.lr, group.weight_decay, group.milestones) == (0.3, 1e-6, None)
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

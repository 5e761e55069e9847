"""Transfer: the published schedules, a frozen encoder, and clear words where a dataset is missing."""

import pytest
import torch

from eval import supervised, transfer
from eval.features import open_encoder
from eval.subject import open_subject
from eval.transfer import TransferConfig, main
from pipeline.errors import UserError
from tests.evaluation import AT_SIDE


def test_learns_and_leaves_the_encoder_alone(run, data, monkeypatch):
    subjects = []
    monkeypatch.setattr(transfer, "open_subject", lambda *a: subjects.append(open_subject(*a)) or subjects[-1])
    before = open_encoder(run).module.state_dict()
    result = main(TransferConfig(checkpoint=run, dataset="folder", data=data, batch=50, lr=0.1, validate_every=14))
    after = subjects[0].encoder.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (result["protocol"], result["changed"]) == ("transfer-folder-modified", {"batch": 50, "lr": 0.1} | AT_SIDE)
    assert result["value"] > 40  # chance is 20


@pytest.mark.parametrize(
    ("dataset", "epochs", "milestones"), [("places205", 14, (4, 8, 12)), ("inat18", 84, (24, 48, 72))]
)
def test_untouched_settings_are_the_published_ones(run, data, monkeypatch, dataset, epochs, milestones):
    seen = {}

    def watch(model, groups, stream, validation, epochs, steps, nesterov, validate_every):
        seen.update(groups=groups, epochs=epochs, nesterov=nesterov)
        return []

    monkeypatch.setattr(supervised, "fit", watch)
    monkeypatch.setattr(transfer, "final_scores", lambda *_: {"top1": 0.0})
    result = main(TransferConfig(checkpoint=run, dataset=dataset, data=data))
    assert (result["protocol"], result["changed"]) == (f"transfer-{dataset}-modified", AT_SIDE)
    assert (seen["epochs"], seen["nesterov"]) == (epochs, True)
    classifier, norm = seen["groups"]
    assert (classifier.lr, norm.lr) == pytest.approx((0.01 * 200 / 256,) * 2)  # all 200 images are one step
    assert (classifier.weight_decay, norm.weight_decay) == (5e-4, 0.0)
    assert classifier.milestones == norm.milestones == milestones
    assert [p.ndim for p in classifier.params] == [2, 1] and [p.ndim for p in norm.params] == [1, 1]


def test_a_dataset_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "DATA", tmp_path)
    with pytest.raises(UserError, match=r"inat18/train\.beton is missing"):
        main(TransferConfig(checkpoint=run, dataset="inat18"))
    with pytest.raises(UserError, match="--dataset folder was given without --data"):
        main(TransferConfig(checkpoint=run, dataset="folder"))
    with pytest.raises(UserError, match="--features pixels was given"):
        main(TransferConfig(checkpoint=run, features="pixels"))

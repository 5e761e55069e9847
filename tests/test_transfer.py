"""Transfer: the published schedules, a frozen encoder, and clear words where a dataset is missing."""

import pytest
import timm
import torch

from eval import frozen, supervised, transfer
from eval.features import open_encoder
from eval.subject import open_subject
from eval.transfer import TransferConfig, main
from pipeline.errors import UserError
from tests.evaluation import AT_SIDE

HERE = {"pooling": "adaptive"} | AT_SIDE  # what every result here changes: its images have 32 px


def test_learns_and_leaves_the_encoder_alone(run, data, monkeypatch):
    subjects = []
    monkeypatch.setattr(transfer, "open_subject", lambda *a: subjects.append(open_subject(*a)) or subjects[-1])
    before = open_encoder(run).module.state_dict()
    result = main(TransferConfig(checkpoint=run, dataset="folder", data=data, batch=50, lr=0.1, validate_every=14))
    after = subjects[0].encoder.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (result["protocol"], result["changed"]) == ("transfer-folder-modified", {"batch": 50, "lr": 0.1} | HERE)
    assert result["settings"]["stage"] == "feature5" and result["details"]["dimensions"] == {"feature5": 96}
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
    assert (result["protocol"], result["changed"]) == (f"transfer-{dataset}-modified", HERE)
    assert (seen["epochs"], seen["nesterov"]) == (epochs, True)
    classifier, norm = seen["groups"]
    assert (classifier.lr, norm.lr) == pytest.approx((0.01 * 200 / 256,) * 2)  # all 200 images are one step
    assert (classifier.weight_decay, norm.weight_decay) == (5e-4, 0.0)
    assert classifier.milestones == norm.milestones == milestones
    assert [p.ndim for p in classifier.params] == [2, 1] and [p.ndim for p in norm.params] == [1, 1]
    result = main(TransferConfig(checkpoint=run, dataset=dataset, data=data, resolution=224))
    assert (result["protocol"], result["changed"]) == (f"transfer-{dataset}", {}), "as published at 224 px"
    assert seen["groups"][0].params[0].shape == (5, 96 * 4), "2 × 2 of the last map"
    result = main(TransferConfig(checkpoint=run, dataset=dataset, data=data, resolution=224, stages=("output",)))
    assert (result["protocol"], result["changed"]) == (f"transfer-{dataset}-modified", {"stage": "output"})


def test_further_stages_change_nothing_of_the_first(run, data, monkeypatch):
    trained = []

    def watched(*args, **how):
        trained.append(args[1])
        return train_heads(*args, **how)

    train_heads = frozen.train_heads
    monkeypatch.setattr(transfer, "train_heads", watched)
    flags = {"checkpoint": run, "dataset": "folder", "data": data, "batch": 50, "epochs": 1, "workers": 1}
    alone = main(TransferConfig(**flags, stages=("feature5",)))
    several = main(TransferConfig(**flags, stages=("feature5", "feature1", "output", "feature1")))
    one, all_three = (heads.state_dict() for heads in trained)
    assert all(torch.equal(value, all_three[name]) for name, value in one.items())
    assert [name for name in all_three if name.endswith("heads.output.weight")], "the case decides nothing"
    assert several["changed"] == alone["changed"] == {"epochs": 1, "batch": 50} | HERE
    assert {"feature1_top1", "feature1_top5", "output_top1", "output_top5"} < set(several["values"])
    shared = alone["values"].keys() - {"final_loss"}
    assert all(several["values"][name] == alone["values"][name] for name in shared)
    first = main(TransferConfig(**flags, stages=("output", "feature5")))
    assert first["changed"]["stage"] == "output" and first["value"] == several["values"]["output_top1"]


def test_a_network_without_stages(data, tmp_path, capsys):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    flags = {"checkpoint": tmp_path / "vit.pth", "arch": "test_vit", "resolution": 32, "epochs": 1, "batch": 50}
    flags |= {"dataset": "folder", "data": data, "workers": 1}
    result = main(TransferConfig(**flags))
    assert result["changed"]["stage"] == "output" and "pooling" not in result["changed"]
    assert (
        "test_vit has no stages as a ResNet has; in place of the published pooled maps its own"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="has no stem and four stages as a ResNet has; .* --stages output"):
        main(TransferConfig(**flags, stages=("feature5",)))


def test_a_dataset_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "DATA", tmp_path)
    with pytest.raises(UserError, match=r"inat18/train\.beton is missing"):
        main(TransferConfig(checkpoint=run, dataset="inat18"))
    with pytest.raises(UserError, match="--dataset folder was given without --data"):
        main(TransferConfig(checkpoint=run, dataset="folder"))
    with pytest.raises(UserError, match="--features pixels was given"):
        main(TransferConfig(checkpoint=run, features="pixels"))

"""Semi-supervised evaluation: every weight trains, each at its own rate, on the right images."""

import json

import numpy as np
import pytest
import safetensors
import timm
import torch

from eval import semisup, supervised
from eval.features import open_encoder
from eval.semisup import SemisupConfig, main
from eval.splits import labelled_subset
from eval.subject import open_subject
from eval.supervised import fit, scheduled_lr
from pipeline.errors import UserError
from pipeline.storage.beton import open_beton
from tests.evaluation import AT_SIDE, write_run
from train.model import make_backbone


@pytest.fixture
def watched(monkeypatch):
    """What `main` hands to the loop, while the loop runs as ever."""
    seen = {}

    def watch(model, groups, stream, **given):
        seen.update(given, model=model, groups=groups)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        history = fit(model, groups, tee(stream), **given)
        seen.update(before=before, after=dict(model.named_parameters()), history=history)
        return history

    def tee(stream):
        seen["batches"] = []
        for images, labels in stream:
            seen["batches"].append((images, labels))
            yield images, labels

    monkeypatch.setattr(supervised, "fit", watch)
    return seen


def test_published_rates_on_every_weight(run, watched):
    result = main(SemisupConfig(checkpoint=run, fraction=0.2, validate_every=20))
    assert (result["protocol"], result["changed"]) == ("semisup-bt-modified", AT_SIDE)
    assert (watched["epochs"], watched["steps"]) == (20, 1)  # 40 images are one batch
    backbone, classifier = watched["groups"]
    assert (backbone.lr, classifier.lr) == (0.005, 0.5)
    assert (backbone.weight_decay, classifier.weight_decay) == (0, 0)
    for epoch, share in ((0, 1.0), (5, 0.853553), (10, 0.5), (19, 0.006156)):  # (1 + cos(π e / 20)) / 2
        assert scheduled_lr(backbone, epoch, 20) == pytest.approx(0.005 * share, rel=1e-4)
        assert scheduled_lr(classifier, epoch, 20) == pytest.approx(0.5 * share, rel=1e-4)
    encoder = open_encoder(run).module
    assert len(backbone.params) == len(list(encoder.parameters()))
    assert len(classifier.params) == 2
    names = {id(p): name for name, p in watched["model"].named_parameters()}
    assert {names[id(p)] for p in backbone.params} == {f"backbone.{name}" for name, _ in encoder.named_parameters()}
    still = [name for name, p in watched["before"].items() if torch.equal(p, watched["after"][name])]
    assert all(".bn" in name for name in still), "only a batch norm's 1.0 may swallow so small a step"
    assert len(still) < 6


def test_one_step_moves_each_group_at_its_rate(run, watched):
    """After one step of SGD a weight has moved by its rate times its gradient."""
    main(SemisupConfig(checkpoint=run, fraction=0.2, epochs=1))
    for group in watched["groups"]:
        for p in group.params:
            name = next(n for n, q in watched["model"].named_parameters() if q is p)
            moved = watched["before"][name] - p.detach()
            assert torch.allclose(moved, group.lr * p.grad, rtol=1e-3, atol=2e-6), name


def test_rate_zero_keeps_the_backbone(run, watched):
    result = main(SemisupConfig(checkpoint=run, fraction=0.2, epochs=1, lr_backbone=0.0))
    moved = {name for name, p in watched["before"].items() if not torch.equal(p, watched["after"][name])}
    assert moved == {"heads.heads.semisup.weight", "heads.heads.semisup.bias"}
    assert result["protocol"] == "semisup-bt-modified"
    assert result["changed"] == {"epochs": 1, "lr_backbone": 0.0} | AT_SIDE


def test_only_the_labelled_share_is_seen(run, data, watched, monkeypatch):
    subjects = []
    monkeypatch.setattr(semisup, "open_subject", lambda *a: subjects.append(open_subject(*a)) or subjects[-1])
    result = main(SemisupConfig(checkpoint=run, fraction=0.1, epochs=3, batch=10))
    expected = labelled_subset(open_beton(data / "train.beton"), 0.1, 0)
    assert subjects[0].subset.ids.tolist() == expected.ids.tolist()
    assert (result["train_images"], result["split"]) == (20, "balanced-0.1-seed0")
    labels = torch.stack([y for _, y in watched["batches"]])
    assert labels.shape == (6, 10)
    for epoch in range(3):
        seen = labels[2 * epoch : 2 * epoch + 2].flatten()
        assert torch.bincount(seen).tolist() == [4, 4, 4, 4, 4]
    assert watched["batches"][0][0].shape == (10, 3, 32, 32)
    assert not torch.equal(watched["batches"][0][0], watched["batches"][2][0])


def test_learns_and_leaves_the_checkpoint_alone(run, watched):
    file = (run / "checkpoint.pt").read_bytes()
    result = main(SemisupConfig(checkpoint=run, fraction=1.0, epochs=6, batch=50, lr_backbone=0.02, validate_every=2))
    assert result["value"] > 50  # chance is 20
    assert [bool(e.accuracy) for e in watched["history"]] == [False, True] * 3
    assert (run / "checkpoint.pt").read_bytes() == file
    assert not (run / "features").exists()


def test_same_command_same_number(run):
    config = SemisupConfig(checkpoint=run, fraction=0.2, epochs=2)
    assert main(config)["values"] == main(config)["values"]


@pytest.mark.slow
def test_seeds_are_trainings_of_their_own(run):
    """Mean and sample standard deviation of what each seed gives by itself."""
    flags = {"checkpoint": run, "fraction": 0.2, "epochs": 1, "batch": 20, "lr_backbone": 0.02}
    alone = [main(SemisupConfig(**flags, seed=seed)) for seed in (4, 5)]
    result = main(SemisupConfig(**flags, seed=4, seeds=2))
    tops = np.array([one["value"] for one in alone])
    assert len(set(tops)) > 1, "the case decides nothing"
    assert result["value"] == result["values"]["top1"] == pytest.approx(tops.mean())
    assert result["values"]["top1_std"] == pytest.approx(tops.std(ddof=1))
    assert [one["top1"] for one in result["details"]["seeds"]] == tops.tolist()
    assert [one["split"] for one in result["details"]["seeds"]] == [f"balanced-0.2-seed{seed}" for seed in (4, 5)]
    assert "top1_std" not in alone[0]["values"] and alone[0]["changed"] == result["changed"]


def test_every_seed_begins_with_the_same_weights(run, data, monkeypatch):
    """A training replaces the checkpoint while the first seed is fine-tuned; the second begins as the first did."""
    starts, before = [], open_encoder(run)

    def replaced(model, *args, **more):
        starts.append({name: w.clone() for name, w in model.backbone.state_dict().items()})
        history = fit(model, *args, **more)
        write_run(run, data, seed=1, step=21)
        return history

    monkeypatch.setattr(supervised, "fit", replaced)
    result = main(SemisupConfig(checkpoint=run, fraction=0.2, epochs=1, batch=20, lr_backbone=0.02, seeds=2))
    assert result["checkpoint_sha256"] == before.info.sha256 != open_encoder(run).info.sha256 and result["step"] == 9
    for start in starts:
        assert all(torch.equal(start[name], w) for name, w in before.module.state_dict().items())
    assert [one["split"] for one in result["details"]["seeds"]] == [f"balanced-0.2-seed{seed}" for seed in (0, 1)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fraction": 2.0}, r"--fraction 2 is outside \(0, 1\]"),
        ({"features": "pixels"}, "no weights to fine-tune"),
        ({"batch": 1}, "at least 2 are needed for batch norm"),
        ({"batch": 0}, "--batch 0 was given"),
        ({"validate_every": 0}, "--validate-every 0 was given"),
        ({"seeds": 0}, "--seeds 0 was given"),
    ],
)
def test_bad_flags(run, flags, message):
    with pytest.raises(UserError, match=message):
        main(SemisupConfig(checkpoint=run, **flags))
    assert not (run / "results.jsonl").exists()


def test_a_missing_run(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere; make one with"):
        main(SemisupConfig(checkpoint=tmp_path / "nowhere"))


@pytest.mark.parametrize("arch", ["test_resnet", "resnet18", "test_vit"])
def test_timm_loads_the_saved_network_in_one_line(data, tmp_path, watched, arch):
    run, path = write_run(tmp_path / "run", data, arch=arch), tmp_path / "mine.safetensors"
    result = main(SemisupConfig(checkpoint=run, fraction=0.2, epochs=1, workers=1, save=path))
    theirs = timm.create_model(arch, num_classes=5, checkpoint_path=path).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours = watched["model"].cpu().eval()(images)["semisup"]
        assert torch.allclose(theirs(images), ours, atol=1e-5) and ours.std() > 0
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["arch"] == arch and json.loads(about["classes"]) == [f"class_{i}" for i in range(5)]
    assert main(SemisupConfig(checkpoint=run, fraction=0.2, epochs=1, workers=1))["values"] == result["values"]


def test_what_cannot_be_saved_is_said_before_the_training(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(semisup, "fine_tune", None)
    given = {"checkpoint": run, "fraction": 0.2, "save": tmp_path / "mine.safetensors"}
    for other, said in (
        ({"seeds": 2}, "--save keeps one network, and --seeds 2 trains several"),
        ({"save": tmp_path / "mine.pth"}, "ends in .safetensors"),
        ({"save": tmp_path / "nowhere" / "mine.safetensors"}, "in a folder that is there"),
        ({"checkpoint": write_run(tmp_path / "narrow", data, arch="resnet10_narrow")}, "timm has no resnet10_narrow"),
    ):
        with pytest.raises(UserError, match=said):
            main(SemisupConfig(**given | other))
    torchvisions = tmp_path / "small.pth"
    torch.save(make_backbone("resnet18", "small")[0].state_dict(), torchvisions)
    with pytest.raises(UserError, match=r"timm has no resnet18 \(small stem\)"):
        main(SemisupConfig(**given | {"checkpoint": torchvisions, "data": data}))

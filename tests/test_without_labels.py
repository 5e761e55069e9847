"""Images without labels from the converter to the report: what needs no label works, what needs one says so."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from eval import heads, knn, linear, semisup, transfer
from eval.report import ReportConfig
from eval.report import main as report
from eval.splits import open_dataset
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.preview import PreviewConfig
from pipeline.preview import main as preview
from scripts.eval_all import EvalAllConfig
from scripts.eval_all import main as eval_all
from tests.evaluation import write_dataset, write_run
from tests.test_online_knn import accuracies, config_of
from tests.test_resume import CPU, end_of
from train.online_knn import choose_images
from train.pretrain import EXIT_FINISHED, train
from train.run_data import loader_config


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory, imagenet_sample) -> Path:
    """Fifty images of a flat folder, converted; and some held out of them."""
    root = tmp_path_factory.mktemp("unlabelled")
    (root / "images").mkdir()
    for path in imagenet_sample[:60]:
        (root / "images" / path.name).symlink_to(path)
    convert(ConvertConfig(root / "data", root / "images", workers=1, max_side=100, holdout=10))
    return root / "data"


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def pretrain(data: Path, folder: Path, **flags) -> int:
    config = config_of(data, folder, global_batch=25, epochs=2, **flags)
    with make_loader(loader_config(config, CPU)) as loader:
        return train(config, CPU, loader)


@pytest.mark.slow
def test_pretraining_without_labels(unlabelled, tmp_path, capsys):
    """The accuracies that need labels are left out with one note; the weights are those of a run without them."""
    assert pretrain(unlabelled, tmp_path / "with", knn_every=1) == EXIT_FINISHED
    assert capsys.readouterr().err.count("note: no nearest-neighbour accuracies in this run: ") == 1
    assert pretrain(unlabelled, tmp_path / "without") == EXIT_FINISHED
    assert end_of(tmp_path / "with") == end_of(tmp_path / "without") and not accuracies(tmp_path / "with")

    report(ReportConfig(runs=(tmp_path / "with",)))
    page = (tmp_path / "with" / "report.html").read_text()
    assert "no result for a table yet" in page and "Correlation matrix" in page and "both views" in page
    assert "50 training images without labels" in page
    assert "learning rate of the weights" in page and (tmp_path / "with" / "report.md").is_file()


def test_a_preview_without_labels(unlabelled, tmp_path, capsys):
    preview(PreviewConfig(data=unlabelled, out=tmp_path / "views.png", images=2, resolution=64))
    assert "2 images, largest difference to Pillow 0 of 255" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "kind", "flags"),
    [
        (knn.main, knn.KnnConfig, {}),
        (linear.main, linear.LinearConfig, {}),
        (linear.main, linear.LinearConfig, {"cached": True}),
        (heads.main, heads.HeadsConfig, {}),
        (semisup.main, semisup.SemisupConfig, {}),
        (transfer.main, transfer.TransferConfig, {"dataset": "folder"}),
    ],
)
def test_every_evaluation_says_that_labels_are_missing(unlabelled, tmp_path, main, kind, flags):
    run = write_run(tmp_path / "run", unlabelled)
    with pytest.raises(UserError, match=r"train\.beton has images without labels, and an evaluation needs them"):
        main(kind(checkpoint=run, data=unlabelled, **flags))
    assert not (run / "results.jsonl").exists()


def test_a_val_without_labels_and_none(unlabelled, tmp_path):
    data = write_dataset(tmp_path / "data")
    for path in data.glob("val.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"val\.beton is missing, .*pipeline/convert\.py makes it, with --holdout 0\.1"):
        open_dataset(data)
    for path in unlabelled.glob("val.*"):
        shutil.copyfile(path, data / path.name)
    with pytest.raises(UserError, match=r"val\.beton has images without labels"):
        open_dataset(data)


def test_the_plan_says_what_cannot_run(unlabelled, tmp_path, capsys):
    run = write_run(tmp_path / "run", unlabelled)
    config = EvalAllConfig(run=run, data_root=tmp_path, plan=True, only=("knn", "semisup-1", "inat18"))
    eval_all(config)
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:3])
    for job in ("knn", "semisup-1"):
        assert said[job].startswith("cannot run: ") and "train.beton has images without labels" in said[job]
    assert said["inat18"] == "inat18 is missing"
    with pytest.raises(SystemExit) as stopped:
        eval_all(replace(config, plan=False))
    assert stopped.value.code == 1 and not (run / "results.jsonl").exists()


def test_labels_beside_images_without(unlabelled, tmp_path):
    """A labelled train beside a val without: training images are asked, as where there is no val."""
    data = write_dataset(tmp_path / "data")
    for path in unlabelled.glob("val.*"):
        shutil.copyfile(path, data / path.name)
    (one, votes), (other, asked) = choose_images(config_of(data, tmp_path / "run"))
    assert one == other == data / "train.beton" and not set(votes) & set(asked)
    assert len(votes) and len(asked)

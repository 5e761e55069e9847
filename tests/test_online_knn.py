"""The accuracy during training: the evaluation's own number, and no trace of it in the weights."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.metrics import knn_accuracy
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import LoaderConfig, centre_view
from pipeline.stopping import EXIT_REQUEUE
from pipeline.storage.beton import open_beton
from tests.evaluation import write_split
from tests.test_resume import CPU, TINY, end_of
from train import online_knn
from train.checkpoint import load_backbone, read_checkpoint
from train.config import NORMALIZATIONS
from train.flags import resolved
from train.online_knn import choose_images
from train.pretrain import EXIT_FINISHED, train
from train.run_data import loader_config

SIDE = 32
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def config_of(data: Path, folder: Path, **flags):
    flags = {"resolution": SIDE, "global_batch": 50, "epochs": 2, "knn_images": 100, "workers": 1} | flags
    return resolved(replace(TINY, data=data, run=str(folder), **flags))


def run(data: Path, folder: Path, **flags) -> int:
    config = config_of(data, folder, **flags)
    loader = make_loader(loader_config(config, CPU))
    try:
        return train(config, CPU, loader)
    finally:
        loader.close()


def accuracies(folder: Path) -> list[dict]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "knn_top1" in line]


def features(backbone, path: Path, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    config = LoaderConfig(path, centre_view(SIDE), SIDE, 50, shuffle=False, ids=ids, workers=1)
    loader = make_loader(replace(config, normalization=NORMALIZATIONS[TINY.views]))
    batches = list(loader.batches())
    loader.close()
    with torch.no_grad():
        return torch.cat([backbone(b.views[0]) for b in batches]), torch.cat([b.label for b in batches])


def test_the_weights_are_those_without_it_and_the_number_is_the_evaluations(data, tmp_path):
    assert run(data, tmp_path / "without") == EXIT_FINISHED
    assert run(data, tmp_path / "with", knn_every=1) == EXIT_FINISHED
    trained, untouched = end_of(tmp_path / "with"), end_of(tmp_path / "without")
    assert trained.pop("online_linear") and {**trained, "content_sha256": ""} == {**untouched, "content_sha256": ""}
    assert not accuracies(tmp_path / "without")
    found = accuracies(tmp_path / "with")
    assert [line["epoch"] for line in found] == [1.0, 2.0]
    backbone, _ = load_backbone(tmp_path / "with")
    (bank_path, votes), (query_path, asked) = choose_images(config_of(data, tmp_path / "with"))
    bank, bank_labels = features(backbone, bank_path, votes)
    queries, labels = features(backbone, query_path, asked)
    expected = knn_accuracy(bank, bank_labels, queries, labels, len(open_beton(bank_path).classes), (20,))[20].top1
    assert found[-1]["knn_top1"] == pytest.approx(expected, abs=1.01 * 100 / len(labels))  # one image's rounding
    assert found[-1]["knn_images"] == len(bank) + len(queries)
    layer = read_checkpoint(tmp_path / "with" / "checkpoint.pt")["online_linear"]["layer"]
    hits = ((queries @ layer["weight"].T + layer["bias"]).argmax(1) == labels).double().mean().item()
    assert found[-1]["linear_top1"] == pytest.approx(100 * hits, abs=1.01 * 100 / len(labels)) and hits > 0
    assert (tmp_path / "with" / "loss.png").exists()


def test_images_are_held_out_where_there_are_some(data, tmp_path):
    """val.beton's where it lies beside; else training images that do not vote. Balanced, the same each time."""
    config = config_of(data, tmp_path)
    (train_path, votes), (val_path, asked) = choose_images(config)
    assert (train_path.name, val_path.name) == ("train.beton", "val.beton")
    for path, ids in ((train_path, votes), (val_path, asked)):
        counts = np.bincount(open_beton(path).labels[ids])
        assert len(ids) <= 100 + len(counts) and counts.max() - counts.min() <= 1
    for path in data.glob("train.*"):
        (tmp_path / path.name).symlink_to(path)
    alone = [choose_images(replace(config, data=tmp_path)) for _ in range(2)]
    (one, votes), (other, asked) = alone[0]
    assert one == other and len(votes) and len(asked) and not set(votes) & set(asked)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(*alone, strict=True))
    write_split(tmp_path / "val.beton", np.arange(4) % 2, ["class_0", "class_2"], 3)
    with pytest.raises(UserError, match=r"--knn-every: .* lacks class_1\); .* the same class folders, or leave it out"):
        choose_images(replace(config, data=tmp_path))


def test_what_stops_it_does_not_stop_the_training(data, tmp_path, monkeypatch, capsys):
    def broken(config):
        raise UserError("image 3 cannot be decoded")

    monkeypatch.setattr(online_knn, "make_loader", broken)
    assert run(data, tmp_path / "r", knn_every=1) == EXIT_FINISHED
    assert not accuracies(tmp_path / "r")
    assert capsys.readouterr().err.count("no more nearest-neighbour accuracies in this run: image 3") == 1


def test_a_stopped_run_does_not_wait_for_it(data, tmp_path, monkeypatch):
    """SIGTERM while it is under way: the run ends, and the resumed one ends with the same weights."""
    begin = online_knn.OnlineKnn.begin

    def begin_and_stop(self, step, log):
        begin(self, step, log)
        signal.raise_signal(signal.SIGTERM)

    assert run(data, tmp_path / "whole", knn_every=1) == EXIT_FINISHED
    with monkeypatch.context() as patch:
        patch.setattr(online_knn.OnlineKnn, "begin", begin_and_stop)
        assert run(data, tmp_path / "cut", knn_every=1) == EXIT_REQUEUE
    assert run(data, tmp_path / "cut", knn_every=1) == EXIT_FINISHED
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    assert accuracies(tmp_path / "cut")[-1] == accuracies(tmp_path / "whole")[-1]

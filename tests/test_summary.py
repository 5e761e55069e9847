"""The table of results."""

import json

import pytest

from eval.report import ReportConfig, main
from eval.subject import append_line
from pipeline.command import UserError


def add(run, protocol, value, encoder="trained", fraction=1.0, arch="resnet18", **more):
    result = {
        "protocol": protocol,
        "metric": "top1",
        "value": value,
        "values": {"top1": value},
        "encoder": encoder,
        "arch": arch,
        "dataset": "cifar10",
        "fraction": fraction,
        "split": "all",
        "train_images": 50_000,
        "val_images": 10_000,
        "classes": 10,
        "seed": 0,
        "changed": {},
        "epochs": 1,
        "step": 9,
        "resolution_px": 32,
        "checkpoint": str(run),
        "checkpoint_sha256": "0" * 64,
        "dataset_sha256": {},
        "seconds": 1.5,
        "time": "2026-01-01T00:00:00+00:00",
    }
    run.mkdir(exist_ok=True)
    append_line(run / "results.jsonl", json.dumps(result | more))


@pytest.fixture
def runs(tmp_path):
    untrained, ours = tmp_path / "untrained", tmp_path / "ours"
    for value in (11.0, 51.25):  # the newer line counts
        add(ours, "knn-mmselfsup", value)
    add(ours, "linear-cached", 60.004)
    add(ours, "semisup-bt", 71.5, fraction=0.1)
    add(ours, "knn-mmselfsup", 40.0, "raw pixels", arch="pixels")
    add(ours, "linear-cached", 41.5, "raw pixels", arch="pixels")
    add(ours, "linear-cached", 1.0, fraction=0.5)  # no column of its own
    add(untrained, "knn-mmselfsup", 25.0, "untrained")
    add(untrained, "semisup-bt", 50.0, "untrained", fraction=0.1)
    return [untrained, ours]


def test_the_table(runs, capsys):
    main(ReportConfig(tuple(runs)))
    printed = capsys.readouterr().out
    assert printed.splitlines()[:5] == [
        "| | kNN top-1 | linear top-1 | 10 % semi-supervised top-1 |",
        "|---|---|---|---|",
        "| raw pixels (cifar10) | 40.00 | 41.50 | – |",
        "| untrained encoder (resnet18, cifar10) | 25.00 | – | 50.00 |",
        "| encoder of ours (resnet18, cifar10) | 51.25 | 60.00 | 71.50 |",
    ]
    assert (runs[1] / "report.md").read_text().startswith(printed)
    assert not (runs[0] / "report.md").exists()


def test_every_protocol_is_named_once(runs, capsys):
    main(ReportConfig(tuple(runs)))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert [note.split("`")[1] for note in notes] == ["knn-mmselfsup", "linear-cached", "semisup-bt"]
    assert "50000 training and 10000 validation images of cifar10" in notes[0]


def test_mixed_protocols_are_named_in_their_cells(runs, capsys):
    add(runs[1], "linear-bt-modified", 62.0, changed={"epochs": 10})
    main(ReportConfig(tuple(runs)))
    printed = capsys.readouterr().out
    assert "| 41.50 `linear-cached` |" in printed and "| 62.00 `linear-bt-modified` |" in printed
    assert "- `linear-bt-modified` top1, seed 0, epochs 10;" in printed


def test_runs_without_results(tmp_path, runs, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/results\.jsonl is missing; measure this run first"):
        main(ReportConfig((runs[0], tmp_path / "empty")))
    (tmp_path / "empty" / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="no result in .*empty; measure this run first"):
        main(ReportConfig((tmp_path / "empty",)))
    add(tmp_path / "other", "svm-voc07", 80.0)
    main(ReportConfig((tmp_path / "other",)))
    assert "No kNN, linear or semi-supervised result yet." in capsys.readouterr().out

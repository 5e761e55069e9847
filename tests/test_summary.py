"""The table of results."""

import json

import pytest

from eval.report import ReportConfig, main
from pipeline.disk import append_line
from pipeline.errors import UserError


def add(run, protocol, value, encoder="trained", fraction=1.0, arch="resnet18", **more):
    result = {
        "protocol": protocol,
        "metric": "top1",
        "value": value,
        "values": {"top1": value},
        "details": {},
        "settings": {},
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


def rows_of(printed: str) -> list[str]:
    lines = printed.splitlines()
    return lines[2 : lines.index("")]


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


def test_no_row_mixes_checkpoints(tmp_path, capsys):
    """A training goes on between two evaluations; each of its checkpoints has its own row, and its own newest cell."""
    run = tmp_path / "ours"
    add(run, "knn-mmselfsup", 30.0, step=9, checkpoint_sha256="a" * 64)
    add(run, "linear-cached", 61.0, step=21, checkpoint_sha256="b" * 64)
    add(run, "knn-mmselfsup", 31.0, step=9, checkpoint_sha256="a" * 64)
    main(ReportConfig((run,)))
    assert rows_of(capsys.readouterr().out) == [
        "| encoder of ours (resnet18, cifar10; step 9) | 31.00 | – |",
        "| encoder of ours (resnet18, cifar10; step 21) | – | 61.00 |",
    ]


def test_every_file_of_a_folder_has_its_row(tmp_path, capsys):
    """Four checkpoints of others, which do not tell a step; two networks of one file; two sides; two datasets."""
    run = tmp_path / "models"
    for i in range(4):
        add(run, "knn-mmselfsup", 10.0 + i, step=0, checkpoint=f"models/{i}.pth", checkpoint_sha256=str(i) * 64)
    main(ReportConfig((run,)))
    found = rows_of(capsys.readouterr().out)
    assert found == [f"| encoder of models (resnet18, cifar10; {i}.pth) | {10 + i}.00 |" for i in range(4)]
    for what, cases in {
        "network": [{"key": "encoder_q"}, {"key": "encoder_k"}],
        "px": [{"resolution_px": 32}, {"resolution_px": 64}],
        "data": [{"dataset_sha256": {"train": c * 64, "val": "e" * 64}} for c in "cd"],
        "checkpoint": [{"checkpoint_sha256": "1" * 64}, {"checkpoint_sha256": "2" * 64}],
    }.items():
        for i, case in enumerate(cases):
            add(tmp_path / what, "knn-mmselfsup", 10.0 + i, **case)
        main(ReportConfig((tmp_path / what,)))
        found = rows_of(capsys.readouterr().out)
        assert [row.split(" | ")[1] for row in found] == ["10.00 |", "11.00 |"]
        titles = {
            "network": ["network encoder_q", "network encoder_k"],
            "px": ["32 px", "64 px"],
            "data": ["data cccccccc/eeeeeeee", "data dddddddd/eeeeeeee"],
            "checkpoint": ["11111111", "22222222"],
        }[what]
        assert [row.split("; ")[1].split(")")[0] for row in found] == titles


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

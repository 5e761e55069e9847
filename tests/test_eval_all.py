"""Every evaluation of one run from one call, at small size: each leaves its line, and none is made twice."""

import json

import pytest

from eval.features import open_encoder
from eval.subject import read_results
from pipeline.command import UserError
from pipeline.disk import append_line
from scripts import eval_all
from scripts.eval_all import EvalAllConfig, main
from tests.evaluation import write_dataset, write_run

EXPECTED = {
    "knn-mmselfsup": 2,
    "linear-cached": 2,
    "linear-cached-sweep": 1,
    "semisup-bt": 2,
    "linear-bt": 1,
    "linear-avgpool": 1,
    "heads-mmselfsup": 1,
    "transfer-places205": 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """places205 is there, inat18 and voc are not."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "imagenet")
    (root / "places205").symlink_to(root / "imagenet", target_is_directory=True)
    return root


@pytest.mark.slow
def test_all_that_the_datasets_allow_once(root, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", root / "imagenet")
    config = EvalAllConfig(run=run, data_root=root, small=True, workers=1)
    main(config)
    results = read_results(run)
    counts = {}
    for result in results:
        name = result["protocol"].removesuffix("-modified")
        counts[name] = counts.get(name, 0) + 1
    assert counts == EXPECTED
    assert [r["encoder"] for r in results if r["protocol"] == "knn-mmselfsup"] == ["trained", "untrained"]
    printed = capsys.readouterr().out
    assert "svm                    voc is missing" in printed
    assert "missing voc: VOCtrainval_06-Nov-2007.tar" in printed and f"unpacked into {root}" in printed
    assert f"convert.py --source FOLDER --out {root / 'inat18'}" in printed
    assert "detection-voc          voc0712 is missing" in printed and "missing coco: train2017.zip" in printed
    assert "| kNN top-1 |" in printed, "the table"

    monkeypatch.setattr(eval_all.report, "main", lambda config: print(f"the table of {config.runs[0]}"))
    main(config)
    assert read_results(run) == results, "nothing was made again"
    printed = capsys.readouterr().out
    assert printed.count("done before") == sum(EXPECTED.values()) and f"the table of {run}" in printed


def test_the_plan_runs_nothing(root, tmp_path, capsys):
    run = write_run(tmp_path / "run", root / "imagenet")
    main(EvalAllConfig(run=run, data_root=root, plan=True, only=("knn", "inat18")))
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == ["knn", "would run"]
    assert not (run / "results.jsonl").exists()
    with pytest.raises(UserError, match="--only everything: no such evaluation; there are knn, "):
        main(EvalAllConfig(run=run, only=("everything",)))


def test_detection_runs_where_its_images_are(root, tmp_path, monkeypatch, capsys):
    """The detector itself is a stand-in here: tests/test_detection.py trains it."""
    run = write_run(tmp_path / "run", root / "imagenet")
    for part in ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012"):
        (tmp_path / part).mkdir(parents=True)
    asked = []

    def measure(config):
        asked.append(config)
        line = {"protocol": "detection-voc0712", "metric": "AP", "value": 1.5, "seconds": 2.0, "details": {}}
        line |= {"encoder": "trained", "checkpoint_sha256": open_encoder(run).info.sha256, "fraction": None}
        append_line(run / "results.jsonl", json.dumps(line))

    monkeypatch.setattr(eval_all.detection, "main", measure)
    monkeypatch.setattr(eval_all.report, "main", lambda config: None)
    config = EvalAllConfig(run=run, data_root=tmp_path, only=("detection-voc", "detection-coco"))
    main(config)
    main(config)
    (one,) = asked
    assert (one.task, one.data, one.iterations) == ("voc", tmp_path / "VOCdevkit", None)
    printed = capsys.readouterr().out
    assert "detection-voc          AP 1.50 in 2 s" in printed and "detection-voc          done before" in printed


def test_one_that_fails_is_named_and_the_others_go_on(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_all.report, "main", lambda config: None)
    run = write_run(tmp_path / "run", root / "imagenet", arch="test_vit")
    with pytest.raises(SystemExit) as stopped:
        main(EvalAllConfig(run=run, data_root=root, small=True, workers=1, only=("knn", "heads")))
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "heads                  failed: " in printed and "knn                    top1_k20 " in printed

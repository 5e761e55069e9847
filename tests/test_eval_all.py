"""Every evaluation of one run from one call, at small size: each leaves its line, and none is made twice."""

import json
import shutil
from dataclasses import replace

import pytest

from eval import knn
from eval.features import open_encoder
from eval.protocols import DETECTION
from eval.subject import read_results
from pipeline.disk import append_line
from pipeline.errors import UserError
from scripts import eval_all
from scripts.eval_all import EvalAllConfig, main
from tests.evaluation import ARCH, write_dataset, write_run

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
    assert [r["encoder"] for r in results if r["protocol"].startswith("knn")] == ["trained", "untrained"]
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
    asked, images = [], {"train": "1", "val": "2"}

    def measure(config):
        """Another program's result is added before this one returns."""
        asked.append(config)
        line = dict.fromkeys(("time", "checkpoint", "dataset", "split"), "") | {"encoder": "trained", "arch": ARCH}
        line |= dict.fromkeys(("step", "epochs", "train_images", "val_images", "classes", "seed"), 0)
        line |= {"protocol": "detection-voc0712", "metric": "AP", "value": 1.5, "values": {}, "seconds": 2.0}
        line |= {"checkpoint_sha256": open_encoder(run).info.sha256, "dataset_sha256": dict(images), "changed": {}}
        line |= {"details": {}, "settings": DETECTION["voc"].settings, "fraction": None, "resolution_px": 32}
        append_line(run / "results.jsonl", json.dumps(line))
        append_line(run / "results.jsonl", json.dumps(line | {"protocol": "knn-mmselfsup", "value": 99.0}))
        return line

    class Images:
        def __init__(self, split):
            self.split = split

        def sha256(self):
            return images[self.split]

    monkeypatch.setattr(eval_all.detection, "main", measure)
    monkeypatch.setattr(eval_all.detection, "open_splits", lambda config: (Images("train"), Images("val")))
    monkeypatch.setattr(eval_all.report, "main", lambda config: None)
    config = EvalAllConfig(run=run, data_root=tmp_path, only=("detection-voc", "detection-coco"))
    main(config)
    main(config)
    (one,) = asked
    assert (one.task, one.data, one.iterations) == ("voc", tmp_path / "VOCdevkit", None)
    printed = capsys.readouterr().out
    assert "detection-voc          AP 1.50 in 2 s" in printed and "detection-voc          done before" in printed
    (job,) = (job for job in eval_all.jobs_of(config, tmp_path) if job.name == "detection-voc")
    info, results = open_encoder(run).info, eval_all.read_results(run)
    assert eval_all.is_done(job, results, info)
    assert not eval_all.is_done(job, results, replace(info, arch="timm:resnetblur18")), "another network of its file"
    normalized = [line | {"normalization": [[0.5] * 3, [0.5] * 3]} for line in results]
    assert not eval_all.is_done(job, normalized, info), "config.json was put beside the file since"
    images["val"] = "other annotations"
    main(config)
    assert len(asked) == 2 and "done before" not in capsys.readouterr().out


def test_done_before_means_the_same_images_weights_and_settings(tmp_path, capsys):
    """The folder's name is the same each time."""
    data = write_dataset(tmp_path / "imagenet")
    run = write_run(tmp_path / "run", data)
    config = EvalAllConfig(run=run, data_root=tmp_path, plan=True, only=("knn", "knn-random"))

    def states() -> list[str]:
        main(config)
        return [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("knn")]

    for other in ({"resolution": 16}, {"feature_type": "float16"}, {"shots": 30}, {"features": "random", "seed": 1}):
        knn.main(knn.KnnConfig(checkpoint=run, **other))
    capsys.readouterr()
    assert states() == ["would run", "would run"]
    knn.main(knn.KnnConfig(checkpoint=run))
    knn.main(knn.KnnConfig(checkpoint=run, features="random"))
    capsys.readouterr()
    assert states() == ["done before", "done before"]
    shutil.rmtree(data)
    write_dataset(data, train_each=30)
    assert states() == ["would run", "would run"], "other images"
    shutil.rmtree(data)
    write_dataset(data)
    assert states() == ["done before", "done before"]
    write_run(run, data, seed=1, step=21)
    assert states() == ["would run", "done before"], "other weights; the random ones are the same"
    shutil.rmtree(data)
    assert main(config) is None and "done before" not in capsys.readouterr().out


def test_the_output_counts_only_for_networks_without_stages(tmp_path):
    data = write_dataset(tmp_path / "places205")
    run = write_run(tmp_path / "run", data)
    config = EvalAllConfig(run=run, data_root=tmp_path, small=True)
    (job,) = (job for job in eval_all.jobs_of(config, data) if job.name == "places205")
    job.main(replace(job.config, stages=("output",)))
    info = open_encoder(run).info
    assert not eval_all.is_done(job, read_results(run), info)
    assert eval_all.is_done(job, read_results(run), info, has_stages=False)
    job.main(job.config)
    assert eval_all.is_done(job, read_results(run), info)


def test_an_encoder_that_changes_meanwhile_is_named(tmp_path, capsys, monkeypatch):
    data = write_dataset(tmp_path / "imagenet")
    run = write_run(tmp_path / "run", data)
    measure = eval_all.knn.main
    monkeypatch.setattr(eval_all.report, "main", lambda config: None)
    monkeypatch.setattr(eval_all.knn, "main", lambda config: write_run(run, data, seed=1, step=21) and measure(config))
    main(EvalAllConfig(run=run, data_root=tmp_path, only=("knn",)))
    assert "of a newer checkpoint (step 21) than this call began with (step 9)" in capsys.readouterr().out


def test_one_that_fails_is_named_and_the_others_go_on(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_all.report, "main", lambda config: None)
    run = write_run(tmp_path / "run", root / "imagenet")

    def fails(config):
        raise UserError("as it should")

    monkeypatch.setattr(eval_all.heads, "main", fails)
    with pytest.raises(SystemExit) as stopped:
        main(EvalAllConfig(run=run, data_root=root, small=True, workers=1, only=("knn", "heads")))
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "heads                  failed: " in printed and "knn                    top1_k20 " in printed

"""The page about a run: its parts against independent computations, and that it needs nothing outside itself."""

import hashlib
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eval import report
from eval.knn import KnnConfig
from eval.knn import main as knn
from eval.report import ReportConfig, main, read_runs
from eval.reporting import neighbours
from eval.reporting.facts import facts, method_of, read_config, with_epochs_done
from eval.reporting.neighbours import class_accuracy, embedding_map, kept_features, shown_queries, vote
from eval.subject import read_results
from pipeline.command import run_command
from pipeline.errors import UserError
from tests.evaluation import ARCH, write_dataset, write_run, write_split, write_state
from train.cards import PRESETS
from train.config import as_plain

IMAGES = 200


# One name that would be a script, and one that is not UTF-8.
CLASSES = ["class_0", "class_$1$", "_class_2", "<script>alert(3)", "class_\udcff"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, measured by kNN."""
    root = tmp_path_factory.mktemp("report")
    data, folder = root / "data", root / "a & b"
    for split, each, seed in (("train", 40, 1), ("val", 12, 2)):
        write_split(data / f"{split}.beton", np.arange(5 * each) % 5, CLASSES, seed)
    config = write_state(folder, data)
    (folder / "config.json").write_text(json.dumps(as_plain(config)))
    (folder / "env.json").write_text('{"world_size": 2, "command": "torchrun train/pretrain.py --epochs 2"}')
    lines = [{"step": i, "epoch": i / 9, "loss": 5 / i, "images_per_s": 64.0} for i in range(1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    knn(KnnConfig(checkpoint=folder))
    return folder


def read_run(folder: Path):
    return read_runs(ReportConfig((folder,)))[0]


def needs_nothing_else(page: str) -> None:
    """No script, no tag of a file's, nothing from outside; the browser is told so, too."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert page.index(f'http-equiv="Content-Security-Policy" content="{policy}"') < page.index("<style>")
    assert not re.search(r"https?://|<script|@import|<link|<iframe|\son\w+=", page)
    assert {found[:5] for found in re.findall(r'(?:src|href)="(.*?)"', page) if found[0] != "#"} <= {"data:"}
    assert all(found[0] == "#" for found in re.findall(r"url\((.*?)\)", page))
    ids = re.findall(r'\sid="(.*?)"', page)
    assert len(set(ids)) == len(ids), "of two charts, too"
    assert set(re.findall(r'href="#(.*?)"|url\(#(.*?)\)', page)) <= {pair for i in ids for pair in ((i, ""), ("", i))}


@pytest.mark.slow
def test_the_page_has_every_part_and_needs_nothing_else(run, capsys):
    main(ReportConfig((run,)))
    page = (run / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        *("What was measured", "Results", "Beside the published numbers", "Training", "Originals and both views"),
        *("Correlation matrix", "Map of the features", "Nearest neighbours", "Accuracy of each class"),
    ]
    links = re.findall('<a href="#(.*?)">(.*?)</a>', page)
    assert links == list(zip(re.findall('<section id="(.*?)">', page), titles, strict=True))
    assert "Left out" not in page and "<h1>a &amp; b</h1>" in page
    needs_nothing_else(page)
    assert page.count("<img") == 3 * 8 + 5 * 9 and page.count("<svg") == 2 + 1 + 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "| | kNN top-1 |" and printed in (run / "report.md").read_text()
    assert page.count("class_\ufffd") > 2 and page.count("&lt;script&gt;alert(3)") > 2
    own = f"Checkpoint {read_results(run)[0]['checkpoint_sha256'][:12]}, step 9."
    assert page.count(own) == 5 and "of another" not in page


def test_a_page_about_a_run_that_trains_on(run, tmp_path):
    """Each part says whose it is: the results and features are those of step 9, the matrix is that of step 21."""
    later = tmp_path / "later"
    shutil.copytree(run, later)
    write_state(later, run.parent / "data", seed=1, step=21)
    sha256 = hashlib.sha256((later / "checkpoint.pt").read_bytes()).hexdigest()[:12]
    old = read_results(run)[0]["checkpoint_sha256"][:12]
    main(ReportConfig((later,)))
    page = (later / "report.html").read_text()
    sections = dict(re.findall("<h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL))
    for title in ("Originals and both views", "Correlation matrix"):
        assert f"Checkpoint {sha256}, step 21. The results are of another: Checkpoint {old}, step 9." in sections[title]
    for title in ("Map of the features", "Nearest neighbours", "Accuracy of each class"):
        assert f"Checkpoint {old}, step 9." in sections[title] and sha256 not in sections[title]


def test_a_page_where_nothing_can_be_shown_as_it_is(run, tmp_path, monkeypatch):
    """A C locale's stdout, and a class that is not UTF-8: the files are whole, and the program ends well."""
    shutil.copytree(run, tmp_path / "rün")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "rün")])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")
    run_command(ReportConfig, main)
    printed.flush()
    assert b"encoder of r?n (test_resnet" in printed.buffer.getvalue()
    page = (tmp_path / "rün" / "report.html").read_text("utf-8")
    assert page.endswith("</html>\n") and "<h1>rün</h1>" in page and "class_\ufffd" in page


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_collapsed_encoder_has_no_map_and_no_neighbours(run, value):
    """t-SNE of equal features ended the process with SIGSEGV."""
    kept = kept_features(run, read_results(run))
    equal = replace(kept, val=torch.full_like(kept.val, value))
    for part in (embedding_map, vote):
        with pytest.raises(UserError, match="all 60 validation images are equal: the encoder has collapsed"):
            part(equal)
    two = replace(kept, val=torch.sign(kept.val[:, :1] - kept.val[:, :1].median()).repeat(1, 96))
    assert np.isfinite(embedding_map(two)[0]).all(), "two points are enough"


def test_features_of_other_images_are_not_shown(run, tmp_path):
    """The dataset's folder holds other images than when it was measured."""
    line = read_results(run)[0]
    other = write_dataset(tmp_path / "data", train_each=5)
    with pytest.raises(UserError, match="has other images than knn-mmselfsup-modified was measured on"):
        kept_features(run, [line | {"data": str(other / "train.beton")}])
    with pytest.raises(UserError, match=r"no features of .*val\.beton are kept"):
        kept_features(run, [line | {"key": "encoder_k"}])
    with pytest.raises(UserError, match="there is no kNN or linear result"):
        kept_features(run, [line | {"protocol": "detection-coco"}])
    del line["data"]
    assert len(kept_features(run, [line]).val) == 60, "an older line, and config.json beside it"


def test_neighbours_against_brute_force(run):
    kept = kept_features(run, read_results(run))
    found = vote(kept)
    train, val = (x.double().numpy() for x in (kept.train, kept.val))
    train, val = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, val))
    cosine = val @ train.T
    assert found.queries.tolist() == list(range(60))
    np.testing.assert_allclose(found.similarity, np.sort(cosine, 1)[:, ::-1][:, : neighbours.VOTERS], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosine, found.rows, 1), found.similarity, atol=1e-5)
    accuracy = class_accuracy(kept, found)
    assert np.mean(list(accuracy.values())) == pytest.approx(read_results(run)[-1]["values"]["top1_k20"])
    assert list(accuracy.values()) == sorted(accuracy.values(), reverse=True)
    labels = kept.dataset.val_labels[found.queries[shown_queries(kept, found)]]
    assert sorted(labels) == [0, 1, 2, 3, 4]


def test_few_similarities_are_affordable(run, monkeypatch):
    monkeypatch.setitem(neighbours.MULTIPLICATIONS, "cpu", 12 * IMAGES * 96)
    kept = kept_features(run, read_results(run))
    found = vote(kept)
    assert len(found.queries) == 12 and found.queries[0] == 0 and found.queries[-1] == 59
    with pytest.raises(UserError, match="12 validation images were affordable here, too few for 5 classes"):
        class_accuracy(kept, found)


def test_map_has_its_own_images(run):
    kept = kept_features(run, read_results(run))
    places, labels, names = embedding_map(kept)
    assert places.shape == (60, 2) and np.isfinite(places).all()
    assert np.bincount(labels).tolist() == [12] * 5 and names == CLASSES


def test_what_is_missing_is_left_out_with_a_sentence(run, tmp_path, capsys):
    bare = write_run(tmp_path / "bare", run.parent / "data")
    (bare / "results.jsonl").write_text((run / "results.jsonl").read_text())
    main(ReportConfig((bare,)))
    page = (bare / "report.html").read_text()
    left_out = re.findall("Left out: (.*?)</p>", page)
    assert "this run was not trained here" in left_out[0]
    assert "does not tell how it was trained" in left_out[1]
    assert "no features of" in left_out[2] and "eval/knn.py --checkpoint" in left_out[2]
    (bare / "checkpoint.pt").unlink()
    main(ReportConfig((bare,)))
    assert "there is no checkpoint" in (bare / "report.html").read_text()


def test_method_of_a_folder_without_configuration(run, tmp_path):
    bare = write_run(tmp_path / "bare", run.parent / "data")
    line = read_results(run)[-1] | {"classes": 1000, "val_images": 50_000, "arch": "resnet50"}
    line |= {"protocol": "knn-mmselfsup", "changed": {}, "settings": {"resolution_px": 224}}
    (bare / "results.jsonl").write_text(json.dumps(line) + "\n")
    for method, times in (("", 0), ("barlow_twins", 4)):
        main(ReportConfig((bare,), method=method))
        table = (bare / "report.md").read_text().split("### MMSelfSup")[1].split("###")[0]
        assert table.count("| knn-mmselfsup |") == times


def test_an_ablated_run_is_no_barlow_twins(run, tmp_path):
    plain = json.loads((run / "config.json").read_text())
    for changes, method in (({}, ""), ({"loss": "invariance"}, ", ablated"), ({"without": ["grey"]}, ", ablated")):
        (tmp_path / "config.json").write_text(json.dumps(plain | changes))
        assert method_of(tmp_path, "other") == "barlow_twins" + method
    old = {name: value for name, value in plain.items() if name not in ("loss", "without")} | {"stop_gradient": True}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert method_of(tmp_path, "other") == "barlow_twins"
    (tmp_path / "config.json").write_text(json.dumps(as_plain(PRESETS["cifar10-simsiam"])))
    assert method_of(tmp_path, "other") == "simsiam" and method_of(tmp_path / "none", "other") == "other"


def test_what_was_measured(run):
    made = facts(read_run(run))
    assert made["Dataset"] == "data: 200 training images in 5 classes, stored at 32 × 32 px"
    assert made["Projector"].endswith("of 16 dimensions") and made["Batch"] == "128 images over 2 processes"
    assert made["Command"] == "`torchrun train/pretrain.py --epochs 2`"
    assert made["Network"].startswith(ARCH) and made["Seed"] == "0"
    assert made["Epochs"] == "1 of 2 so far (9 steps)"
    assert made["Time"] == f"{9 * 128 / 64:.0f} s of training, 64 images a second"
    assert "60 validation images in 5 classes" in made["Evaluated on"]
    config = replace(read_config(run), data=run / "gone" / "train.beton")
    gone = facts(replace(read_run(run), config=config))["Dataset"]
    assert gone.startswith("gone (not there now: no train.beton in ")


def test_the_epochs_behind_a_checkpoint(run, tmp_path):
    """The run is to have two epochs and has had one; a checkpoint from its middle has fewer still."""
    (line,) = read_results(run)
    assert (line["epochs"], line["step"]) == (2, 9) and read_run(run).results[0]["epochs"] == 1
    assert with_epochs_done([line | {"step": 3}], run)[0]["epochs"] == 0.33
    assert with_epochs_done([line | {"epochs": 1}], run) == [line | {"epochs": 1}], "done"
    assert with_epochs_done([line], tmp_path) == [line], "of a folder that is no run's"
    (tmp_path / "config.json").write_text(json.dumps(as_plain(replace(PRESETS["cifar10"], init_from=run))))
    assert with_epochs_done([line], tmp_path)[0]["epochs"] == 0, "nothing tells how long it was trained before"


@pytest.mark.parametrize("changes", [{"amp": "fp4"}, {"epochs": "three"}, {"projector": None}])
def test_a_configuration_that_no_run_writes(run, tmp_path, changes):
    shutil.copy(run / "metrics.jsonl", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | changes))
    with pytest.raises(UserError, match="holds a value that no run writes .* restore the file, or move it away"):
        main(ReportConfig((tmp_path,)))


def test_no_images_are_named_that_were_not_trained_on(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    info = json.dumps({"features": 96, "dataset_sha256": "ab" * 32})
    save_file({"x": np.zeros(1)}, copied / "backbone.safetensors", {"backbone": info})
    made = facts(read_run(copied))
    assert made["Dataset"] == "data (its folder holds other images now than those that were trained on)"
    assert made["Network"] == f"{ARCH}, 96 features"


def test_two_runs_side_by_side(run, tmp_path, monkeypatch):
    """Settings that differ stand out, equal ones are said once; curves share a chart; the title names both."""
    monkeypatch.setattr(report, "of_correlation", lambda *_: [])
    monkeypatch.setattr(report, "of_kept_features", lambda *_: [])
    other = tmp_path / "other" / run.name
    shutil.copytree(run, other)
    plain = json.loads((run / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(plain | {"lambd": 0.5, "seed": 7}))
    main(ReportConfig((run, other)))
    page = (other / "report.html").read_text()
    first, last = f"{run.parent.name}/a &amp; b", "other/a &amp; b"
    assert f"<h1>{first} and {last}</h1>" in page, "equal names are told apart"
    assert f'class=ours><th>Seed</th><td data-of="{first}">0</td><td data-of="{last}">7</td>' in page
    assert "<th>Batch</th><td colspan=2>128 images over 2 processes</td>" in page
    assert page.count("<h3>Other settings that differ</h3>") == 1 and ">0.5</td>" in page
    loss = re.search("<b>loss</b>(.*?)</svg>", page, re.DOTALL)[1]
    assert "var(--c0)" in loss and "var(--c1)" in loss
    needs_nothing_else(page)
    assert not (run / "report.html").exists() or (run / "report.html").read_text() != page

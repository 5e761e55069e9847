"""The page about a run: its parts against independent computations, and that it needs nothing outside itself."""

import base64
import io
import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from eval import neighbours
from eval.charts import MOST_POINTS, line_chart, nice_ticks, thinned
from eval.correlation import correlate, load_method, read_state
from eval.knn import KnnConfig
from eval.knn import main as knn
from eval.neighbours import class_accuracy, embedding_map, kept_features, shown_queries, vote
from eval.page import matrix_picture
from eval.report import ReportConfig, coloured, main, method_of
from eval.subject import read_results
from pipeline.beton import open_beton
from pipeline.command import UserError
from pipeline.constants import CIFAR10_MEAN, CIFAR10_STD
from pipeline.draws import draw_views
from pipeline.loader_torch import apply_view_pil, decode_pil
from pipeline.order import shuffled_batches
from tests.evaluation import ARCH, write_dataset, write_run
from train.cards import PRESETS
from train.checkpoint import save_checkpoint
from train.config import as_plain
from train.methods.choose import make_method, view_table
from train.model import make_backbone
from train.runstate import backbone_info

IMAGES = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as the trainer leaves it, of a network that has seen no image, measured by kNN."""
    root = tmp_path_factory.mktemp("report")
    data, folder = write_dataset(root / "data"), root / "a & b"
    config = replace(PRESETS["cifar10-demo"], data=data, run=str(folder), arch=ARCH, projector="24-16")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone, features = make_backbone(ARCH)
        method = make_method(backbone, features, config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(as_plain(config)))
    lines = [{"step": i, "epoch": i / 9, "loss": 5 / i, "lr_weights": 0.1} for i in range(1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = asdict(backbone_info(config, features, 9))
    parts = {"model": method.state_dict(), "optimizer": {}, "scaler": {}}
    save_checkpoint(folder, {"config": as_plain(config), "backbone": info, "step": 9, "images": IMAGES, **parts})
    knn(KnnConfig(checkpoint=folder))
    return folder


@pytest.mark.slow
def test_the_page_has_every_part_and_needs_nothing_else(run, capsys):
    main(ReportConfig((run,)))
    page = (run / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        *("Results", "Beside the published numbers", "Training", "Both views", "Correlation matrix"),
        *("Map of the features", "Nearest neighbours", "Accuracy of each class"),
    ]
    assert "Left out" not in page and "<h1>a &amp; b</h1>" in page
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"} and "url(" not in page
    assert not re.search(r"https?://|<script|@import", page)
    assert page.count("<img") == 2 * 8 + 1 + 5 * 9 and page.count("<circle") == 60 + 2
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "| | kNN top-1 |" and printed in (run / "report.md").read_text()


def test_correlation_against_numpy(run):
    """The matrix of the fast loader's views is float64's Pearson correlation of the PIL loader's, to their rounding."""
    found = correlate(run)
    method, config = load_method(read_state(run)[0])
    beton, views = open_beton(run.parent / "data" / "train.beton"), view_table(config)
    _, epoch, ids = next(shuffled_batches(config.seed, np.arange(IMAGES), 128, 0, 1, 0, 1))
    params = draw_views(config.seed, epoch, ids, beton.heights[ids], beton.widths[ids], views, 32)
    mean, std = (np.array(v) for v in (CIFAR10_MEAN, CIFAR10_STD))
    z = []
    for v, view in enumerate(views):
        made = [apply_view_pil(decode_pil(beton, i), params, b, v, view.interpolation, 32) for b, i in enumerate(ids)]
        pixels = (np.stack([np.asarray(image) for image in made]) / 255 - mean) / std
        with torch.no_grad():
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
            z.append(method.projector(method.backbone(inputs)).double().numpy())
    expected = np.corrcoef(*z, rowvar=False)[:16, 16:]
    assert found.images == 128 and found.matrix.shape == (16, 16)
    np.testing.assert_allclose(found.matrix, expected, atol=2e-4)
    off = expected[~np.eye(16, dtype=bool)]
    assert found.diagonal_mean == pytest.approx(expected.diagonal().mean(), abs=1e-4)
    assert found.off_diagonal_rms == pytest.approx(np.sqrt((off**2).mean()), abs=1e-4)
    shown = np.stack([np.stack(pair) for pair in found.pairs])
    assert shown.shape == (8, 2, 32, 32, 3) and len({s.tobytes() for s in shown.reshape(16, -1)}) == 16


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
    assert np.bincount(labels).tolist() == [12] * 5 and names == [f"class_{i}" for i in range(5)]


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


def test_ticks_and_thinning():
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(0.0021, 0.0089) == pytest.approx([0.004, 0.006, 0.008])
    assert nice_ticks(3, 77) == [20, 40, 60]
    many = thinned(range(10_001))
    assert len(many) <= MOST_POINTS + 1 and (many[0], many[-1]) == (0, 10_000)
    assert thinned([7]) == [7]


def test_line_chart_places_its_points():
    chart = line_chart("a < b", "epoch", [0, 1, 2], [10.0, float("nan"), 30.0])
    assert "a &lt; b" in chart and "last 30" in chart
    (path,) = re.findall('class="l" d="M(.*?)"', chart)
    assert [[float(x) for x in point.split()] for point in path.split("L")] == [[46, 176], [330, 30]]


def test_matrix_picture_is_clear_at_zero():
    uri = re.search('base64,(.*?)"', matrix_picture(np.array([[1.0, 0.0], [-0.5, 2.0]]), "C"))[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
    assert pixels[..., 3].tolist() == [[255, 0], [128, 255]]
    assert pixels[0, 0, 2] > pixels[0, 0, 0] and pixels[1, 0, 0] > pixels[1, 0, 2]


def test_differences_are_coloured_by_their_sign():
    assert coloured("+1.00 / +0.20") == '<span class="plus">+1.00 / +0.20</span>'
    assert coloured("-1.00") == '<span class="minus">−1.00</span>'
    assert coloured("-1.00 / +0.20") == '<span class="">−1.00 / +0.20</span>' and coloured("") == "–"

"""Parts of the page by themselves: the charts, their colours and their files."""

import base64
import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from eval.reporting.charts import PALETTE, Charts, matrix, training
from eval.reporting.page import PARTS, STYLE
from pipeline.errors import UserError
from train.cards import PRESETS
from train.curves import MOST_POINTS, draw_curves, thinned


def test_curves_of_what_the_trainer_writes(tmp_path):
    """null where fp16 skipped a step, other names in other lines, a torn line, and what is no line of the trainer's."""
    lines = ['{"step": 20, "epoch": 1, "loss": 5.0, "lost": null}', '{"step": 40, "epoch": 2, "loss": null, "grad": 2}']
    lines += [
        '{"step": 60, "epoch": 3, "knn_top1": 44.0, "linear_top1": 41}',
        '{"step": 80, "epo',
        "[1]",
        '{"epoch": null, "loss": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 100, "epoch": 5, "loss": 3.0}']) + "\n")
    made = training({"run": (tmp_path, None)}, Charts())
    titles = re.findall("<figcaption><b>(.*?)</b><span><span>(.*?)</span>", made)
    assert titles == [("loss", "3"), ("kNN top-1, %", "44"), ("online linear top-1, %", "41"), ("grad", "2")]
    assert re.findall("<h3>(.*?)</h3>", made) == ["Loss", "Accuracy in training", "Other numbers"]
    assert "Nowhere finite: lost." in made
    (tmp_path / "metrics.jsonl").write_text('{"step": 80, "epo')
    with pytest.raises(UserError, match="has no line"):
        training({"run": (tmp_path, None)}, Charts())


def test_names_in_a_record_are_text(tmp_path):
    """A metric and a run that are called like a tag, a formula or an underscore; in the file, too."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "<img onerror=x> $a$ \\\\1": 5.0}\n')
    runs = {"<script>": (tmp_path, None), "_$b$": (tmp_path, None)}
    (tmp_path / "charts").mkdir()
    made = training(runs, Charts(tmp_path / "charts", "svg"))
    assert made.count("&lt;img onerror=x&gt; $a$ \\1") == 2 and "<img" not in made and "<script" not in made
    assert "&lt;script&gt;" in made and "_$b$" in made
    (file,) = (tmp_path / "charts").iterdir()
    texts = ["".join(element.itertext()) for element in ElementTree.parse(file).iter() if element.tag.endswith("text")]
    assert {"<script>", "_$b$", "<img onerror=x> $a$ \\1"} <= set(texts)


def test_charts_take_the_colours_of_the_page(tmp_path):
    """Each is a variable that style.css has in light and in dark; the file of the same chart has the light colour."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "effective_dimensions": 7.04}\n')
    config = replace(PRESETS["cifar10-demo"], projector="64-32", global_batch=16)
    made = training({"run": (tmp_path, config)}, Charts(tmp_path, "svg"))
    assert "7.0 of 32" in made and "at most 15 effective dimensions" in made
    used = set(re.findall(r"var\(--(\w+)\)", made))
    light, dark = STYLE.split("@media(prefers-color-scheme:dark)")
    assert {"c0", "soft", "line", "good"} <= used and all(f"--{c}:#" in light and f"--{c}:#" in dark for c in used)
    assert not re.search("(?:fill|stroke): #", made), "no colour of its own"
    assert PALETTE["c0"] in (tmp_path / "effective_dimensions.svg").read_text()


def test_a_run_below_the_healthy_values_shows_them(tmp_path):
    """The axis reaches the band, which begins above the curves, and no curve is cut."""
    axes = Figure().add_subplot()
    draw_curves(axes, "effective_dimensions", [([(0.0, 1.1), (1.0, 1.2)], "red"), ([(0.0, 1.0), (1.0, 1.0)], "blue")])
    assert axes.get_ylim()[1] > 2 and axes.get_ylim()[0] < 1 and len(axes.patches) == 1
    axes = Figure().add_subplot()
    draw_curves(axes, "embedding_spread", [([(0.0, 0.6), (1.0, 0.6)], "red"), ([(0.0, 0.9), (1.0, 0.9)], "blue")])
    assert axes.get_ylim()[1] > 0.9


def test_charts_as_pdf(tmp_path):
    matrix(np.eye(4), Charts(tmp_path, "pdf"))
    assert (tmp_path / "correlation_matrix.pdf").read_bytes().startswith(b"%PDF")


def test_thinning():
    many = thinned([(i, i) for i in range(10_001)])
    assert len(many) <= MOST_POINTS + 1 and (many[0], many[-1]) == ((0, 0), (10_000, 10_000))
    assert thinned([(7, 7)]) == [(7, 7)]


def test_matrix_is_clear_at_zero():
    """The picture in the chart: blue above 0, orange below, nothing at 0."""
    uri = re.search('base64,(.*?)"', matrix(np.array([[1.0, 0.0], [-0.5, 2.0]]), Charts()).replace(" ", ""))[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
    assert pixels.shape == (2, 2, 4) and pixels[..., 3].tolist() == [[255, 0], [127, 255]]
    assert pixels[0, 0, 2] > pixels[0, 0, 0] and pixels[1, 0, 0] > pixels[1, 0, 2]


def test_differences_are_coloured_by_their_sign():
    coloured = PARTS.difference
    assert coloured("+1.00 / +0.20") == '<span class="plus">+1.00 / +0.20</span>'
    assert coloured("-1.00") == '<span class="minus">−1.00</span>'
    assert coloured("-1.00 / +0.20") == '<span class="">−1.00 / +0.20</span>' and coloured("") == "–"

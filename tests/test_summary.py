"""The table of results."""

import csv
import io
import json
import re
import shutil
import subprocess

import markdown
import pytest

from eval import protocols
from eval.protocols import Protocol
from eval.report import ReportConfig, main
from eval.reporting.comparison import comparisons
from eval.reporting.page import as_markdown
from eval.reporting.summary import as_latex
from pipeline.disk import append_line
from pipeline.errors import UserError
from train.cards import PRESETS
from train.config import as_plain


def add(run, protocol, value, encoder="trained", fraction=1.0, arch="resnet18", **more):
    result = {
        "protocol": protocol,
        "metric": "top1",
        "value": value,
        "values": {"top1": value},
        "details": {},
        "settings": {"norm_images": 32},  # a line without it would be from before there was a choice
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
    assert printed in (runs[1] / "report.md").read_text()
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
    add(tmp_path / "other", "of-my-own", 80.0)
    main(ReportConfig((tmp_path / "other",)))
    assert (
        "Left out: no result for a table yet; on labelled images `python eval/knn.py --checkpoint"
        in capsys.readouterr().out
    )
    for flag in ({"csv": True}, {"latex": True}):
        with pytest.raises(UserError, match="no result for a table yet; .* gets one"):
            main(ReportConfig((tmp_path / "other",), **flag))


def test_every_kind_of_evaluation_has_a_column(tmp_path, capsys):
    run = tmp_path / "ours"
    ours = [p for p in vars(protocols).values() if isinstance(p, Protocol)]
    ours += [*protocols.TRANSFER.values(), *protocols.DETECTION.values()]
    for protocol in ours:
        fraction = None if protocol.name.startswith("detection") else 0.1 if protocol.name == "semisup-bt" else 1.0
        add(run, protocol.name, 50.0, fraction=fraction)
    main(ReportConfig((run,)))
    head = capsys.readouterr().out.splitlines()[0]
    assert head.count("|") == 2 + 7, head


def test_what_two_runs_differ_by(runs, capsys):
    """Only numbers that may be compared: the same protocol, settings and images. Raw pixels are nobody's."""
    main(ReportConfig(tuple(runs)))
    assert "| ours minus untrained | +26.25 | – | +21.50 |" in capsys.readouterr().out
    add(runs[1], "knn-mmselfsup", 60.0, dataset_sha256={"train": "a"})
    add(runs[1], "semisup-bt-modified", 60.0, fraction=0.1, changed={"epochs": 10})
    main(ReportConfig(tuple(runs)))
    assert "| ours minus untrained | +26.25 | – | – |" in capsys.readouterr().out


def test_a_sentence_where_controls_are_ahead(runs, capsys):
    main(ReportConfig(tuple(runs)))
    assert "Controls do as well" not in capsys.readouterr().out
    add(runs[1], "linear-cached", 43.0, "raw pixels", arch="pixels", changed={"epochs": 90})  # of another training
    add(runs[1], "knn-mmselfsup", 51.25, "raw pixels", arch="pixels", resolution_px=16, changed={"resolution_px": 16})
    add(runs[0], "semisup-bt", 80.0, "untrained", fraction=0.1)
    main(ReportConfig(tuple(runs)))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "Controls do as well or better: kNN top-1 of raw pixels (cifar10; 16 px) is 51.25, of encoder of ours "
        "(resnet18, cifar10) 51.25; 10 % semi-supervised top-1 of untrained encoder (resnet18, cifar10) is 80.00, of "
        "encoder of ours (resnet18, cifar10) 71.50."
    )
    assert (runs[1] / "report.html").read_text().count('<p class="ahead">Controls do as well') == 1


def test_raw_pixels_have_no_stages(runs, capsys):
    """Of a network that sees 32 px the maps are pooled in another way: that is its own, too."""
    for encoder, stage, value in (
        ("trained", {"pooling": "adaptive"}, 20.0),
        ("raw pixels", {"stage": "output"}, 21.0),
    ):
        settings = {"settings": {"stage": "feature5", "view": "squash"} | stage, "changed": stage}
        add(runs[1], "svm-voc07-modified", value, encoder, **settings)
    main(ReportConfig((runs[1],)))
    assert "Controls do as well or better: SVM mAP of raw pixels" in capsys.readouterr().out


def test_csv(runs, capsys):
    add(runs[1], "linear-bt-modified", 62.0, changed={"epochs": 10}, dataset='c"i,f\nar')
    main(ReportConfig(tuple(runs), csv=True))
    head, *body = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head == [
        *("encoder", "kNN top-1 (knn-mmselfsup)", "linear top-1 (linear-bt-modified)"),
        *("linear top-1 (linear-cached)", "10 % semi-supervised top-1 (semisup-bt)"),
    ]
    assert {len(row) for row in body} == {5}
    assert body[1] == ["untrained encoder (resnet18, cifar10)", "25.00", "", "", "50.00"]
    assert body[2] == ['encoder of ours (resnet18, c"i,f\nar)', "51.25", "62.00", "", "71.50"]


def test_latex(runs, capsys, tmp_path):
    """Every row has as many cells as columns, and LaTeX, where it is installed, takes it."""
    name = r"a_b & 5% #1 $x$ {y} \z ~ ^"
    hostile = tmp_path / name
    add(hostile, "knn-mmselfsup", 51.25)
    add(hostile, "linear-bt-modified", 62.0, changed={"epochs": 10})
    add(hostile, "linear-cached", 41.5, "raw pixels")
    main(ReportConfig((runs[0], hostile), latex=True))
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert text.startswith("\\begin{tabular}{lrrr}\n\\hline\n") and len(rows) == 5
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {3}
    assert as_latex("-3.33") == "$-$3.33"
    assert r"62.00 \texttt{linear-bt-modified}" in text and r"10 \% semi-supervised" in text
    if shutil.which("pdflatex"):
        whole = "\\documentclass{article}\\begin{document}\n" + text + "\n\\end{document}\n"
        (tmp_path / "table.tex").write_text(whole)
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


def test_one_form_at_a_time(runs):
    with pytest.raises(UserError, match="--csv and --latex are two forms of the one table; give one of them"):
        main(ReportConfig(tuple(runs), csv=True, latex=True))
    assert not (runs[1] / "report.md").exists()


def test_an_encoder_of_somebody_else(tmp_path):
    add(tmp_path / "x.pth.results", "knn-mmselfsup", 50.0)
    (tmp_path / "x.pth").touch()
    main(ReportConfig((tmp_path / "x.pth",)))
    page = (tmp_path / "x.pth.results" / "report.html").read_text()
    assert "has neither its projector nor its views" in page and "<th>Network</th><td>resnet18</td>" in page


def test_charts_have_a_folder(runs):
    (runs[1] / "charts").touch()
    with pytest.raises(UserError, match="charts is no folder and cannot be made one: File exists"):
        main(ReportConfig(tuple(runs), charts="pdf"))


def test_only_tables_with_ours_are_open(tmp_path):
    """Outside of <details> every published table has a number of ours; the others are in there, on page and in .md."""
    run = tmp_path / "ours"
    add(run, "linear-cached", 60.0)
    main(ReportConfig((run,), method="barlow_twins"))
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    published = {name for name in comparisons([])}
    for document, heading, ours in ((page, "<h3>(.*?)</h3>", "class=ours"), (text, "### (.*)", "60.00")):
        opened, folded = document.split("<details>")
        folded = folded.split("</details>")[0]
        shown = [name for name in re.findall(heading, opened) if name in published]
        assert shown == ["CIFAR-10, ResNet-18"] and {*shown, *re.findall(heading, folded)} == published
        assert all(ours in part for part in re.split(heading, opened)[2::2]) and ours not in folded


def test_names_of_results_are_text(tmp_path, capsys):
    """In the page, in report.md as another program renders it, and in a terminal."""
    run, other = tmp_path / "<b>|x`", tmp_path / "a](javascript:alert(2))"
    evil = "<script>alert(1)</script>|\n\n# x\n| y |`<img src=x>`` [z](javascript:alert(3)) &lt;u&gt; \\| \x1b[2J"
    more = {name: evil for name in ("dataset", "arch", "metric", "split", "key", "device", "time")}
    add(run, f"knn{evil}", 50.0, changed={evil: evil}, **more)
    add(run, "knn-mmselfsup", 50.0, checkpoint_sha256="1" * 64, checkpoint=evil, **more)
    add(other, f"linear-bt-modified{evil}", 60.0, changed={evil: evil})
    (run / "env.json").write_text(json.dumps({"command": f"`{evil}`"}))
    lines = {"step": 1, "epoch": 1, "images_per_s": 1.0, evil: 5.0}
    (run / "metrics.jsonl").write_text(json.dumps(lines) + "\n")
    (run / "config.json").write_text(json.dumps(as_plain(PRESETS["cifar10-demo"]) | {"projector": "8-4", "arch": evil}))
    main(ReportConfig((other, run)))
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert not re.search(r"<script|<b>\||<img [^>]*src=(?!\"data:)|href=\"(?!#)|\x1b", page)
    assert page.count("&lt;script&gt;") > 8
    rows = [line for line in text.splitlines() if line.startswith("|")]
    heads = [line for line in rows if line.startswith("|---")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {line.count("|") for line in heads}
    rendered = markdown.markdown(text, extensions=["tables"])
    assert not re.search(r"<script|<img|<a |<h1|javascript:[^<]*\">", rendered) and rendered.count("<h2>") == 1
    assert "\x1b" not in text + capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b <c> | d", "a_b &lt;c> \\| d"),
        ("`knn|x` 5 % `", "`knn\\|x` 5 % \\`"),
        ("``x``", "\\``x`\\`"),
        ("`a\\|<b>`", "\\`a\\\\\\|&lt;b>\\`"),
        ("a\\|b\n# c", "a\\\\\\|b # c"),
        ("[1, 2] ![x](y) [z]: u", "[1, 2] ![x\\](y) [z\\]: u"),
        ("a & b &amp; &#60;", "a & b &amp;amp; &amp;#60;"),
    ],
)
def test_markdown_that_shows_a_text(text, shown):
    assert as_markdown(text) == shown

"""The table of several methods: what is averaged, what an interval is, what is missing, and what may not be mixed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from scripts.comparison_table import TableConfig, main

DATA = {"train": "1" * 64, "val": "2" * 64}


def line(value: float, **more) -> str:
    result = dict.fromkeys(("time", "metric", "arch", "checkpoint", "dataset"), "") | {"protocol": "knn"}
    result |= dict.fromkeys(("epochs", "resolution_px", "train_images", "val_images", "classes", "seed", "seconds"), 0)
    result |= {"encoder": "trained", "value": value, "values": {}, "details": {}, "settings": {}, "changed": {}}
    result |= {"dataset_sha256": DATA, "fraction": 1.0, "split": "all", "step": 9, "checkpoint_sha256": "a"}
    return json.dumps(result | more) + "\n"


def run_folder(folder: Path, method: str, seed: int, value: float, *lines: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed, "preset": "cifar10-demo"}))
    newest_counts = line(0.0) + line(value) + line(99.0, encoder="raw pixels")
    (folder / "results.jsonl").write_text(newest_counts + "".join(lines))
    return folder


def tabulate(out: Path, capsys, *runs: Path, rows: str = "method") -> str:
    main(TableConfig(runs=runs, out=out, rows=rows))
    return capsys.readouterr().out


def test_means_and_intervals_over_seeds(tmp_path, capsys):
    runs = [run_folder(tmp_path / f"a{seed}", "byol", seed, v) for seed, v in enumerate((10.0, 12.0, 14.0))]
    runs.append(run_folder(tmp_path / "b0", "simclr", 0, 20.0))
    printed = tabulate(tmp_path / "out", capsys, *runs)
    half = 4.302653 * np.std([10, 12, 14], ddof=1) / np.sqrt(3)  # Student's t for two degrees of freedom
    assert f"| byol | 12.00 ± {half:.2f} | 0, 1, 2 |" in printed
    assert "| simclr | 20.00 | 0 |" in printed
    assert (tmp_path / "out" / "table.md").read_text() == printed
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_of_a_run_started_over_the_network_that_is_there_counts(tmp_path, capsys):
    """Not the one of the most steps, which is gone; nor one that was measured last and kept under another name."""
    run = run_folder(tmp_path / "a", "byol", 0, 96.0, line(93.0, step=5, checkpoint_sha256="b"))
    assert "| byol | 93.00 | 0 |" in tabulate(tmp_path / "out", capsys, run)
    (run / "checkpoint.pt").write_bytes(b"its weights")
    there = hashlib.sha256(b"its weights").hexdigest()
    (run / "results.jsonl").write_text(line(91.0, step=5, checkpoint_sha256=there) + line(96.0))
    assert "| byol | 91.00 | 0 |" in tabulate(tmp_path / "out", capsys, run)


def test_a_run_without_results_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/results\.jsonl is missing"):
        tabulate(tmp_path / "out", capsys, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_ablations_stand_beside_the_papers(tmp_path, capsys):
    named = (("no-norm-0", 30.0), ("no-norm-1", 32.0), ("baseline-0", 40.0), ("width-half-0", 35.0))
    runs = [run_folder(tmp_path / f"ablate-cifar10-demo-{n}", "barlow_twins", int(n[-1]), v) for n, v in named]
    printed = tabulate(tmp_path / "out", capsys, *runs, rows="ablation")
    assert "| no-norm | 31.00 ± " in printed and "| 53.4 | 0, 1 |" in printed
    assert "| baseline | 40.00 | 71.4 | 0 |" in printed and "| width-half | 35.00 | – | 0 |" in printed


def test_only_the_checkpoint_that_is_there_counts(tmp_path, capsys):
    """kNN of step 21, measured before that of step 9; the linear classifier of step 9 has no place beside it."""
    later = line(50.0, step=21, checkpoint_sha256=hashlib.sha256(b"its weights").hexdigest())
    old = line(30.0) + line(60.0, protocol="linear-cached")
    run = run_folder(tmp_path / "a", "byol", 0, 10.0, later, old)
    (run / "checkpoint.pt").write_bytes(b"its weights")
    printed = tabulate(tmp_path / "out", capsys, run)
    assert printed.splitlines()[0] == "| method | knn | seeds |" and "| byol | 50.00 | 0 |" in printed


def test_other_settings_are_other_columns(tmp_path, capsys):
    one = line(60.0, protocol="linear-cached-modified", changed={"epochs": 1, "resolution_px": 32})
    two = line(70.0, protocol="linear-cached-modified", changed={"resolution_px": 32})
    runs = [run_folder(tmp_path / name, name, 0, 10.0, more) for name, more in (("byol", one), ("simclr", two))]
    printed = tabulate(tmp_path / "out", capsys, *runs)
    assert "linear-cached, epochs 1, resolution_px 32 | linear-cached, resolution_px 32" in printed
    assert "| byol | 10.00 | 60.00 | – | 0 |" in printed and "| simclr | 10.00 | – | 70.00 | 0 |" in printed


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    runs = [run_folder(tmp_path / "a", "byol", 0, 10.0), run_folder(tmp_path / "b", "byol", 0, 11.0)]
    with pytest.raises(UserError, match="a and .*b are both byol with seed 0"):
        tabulate(tmp_path / "out", capsys, *runs)
    other = line(12.0, dataset_sha256=DATA | {"val": "3" * 64})
    runs = [runs[0], run_folder(tmp_path / "c", "simclr", 0, 11.0, other)]
    with pytest.raises(UserError, match="knn was measured on other images in .*c than in .*a"):
        tabulate(tmp_path / "out", capsys, *runs)

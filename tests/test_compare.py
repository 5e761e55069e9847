"""Methods and ablations: what is run with which flags; what the table averages, lacks, and may not mix."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tyro

from pipeline.errors import UserError
from scripts import compare
from scripts.compare import CompareConfig
from train.cards import PRESETS
from train.config import METHOD_NAMES, PretrainConfig
from train.flags import resolved

DATA = {"train": "1" * 64, "val": "2" * 64}


def line(value: float, **more) -> str:
    result = dict.fromkeys(("time", "metric", "arch", "checkpoint", "dataset"), "") | {"protocol": "knn"}
    result |= dict.fromkeys(("epochs", "resolution_px", "train_images", "val_images", "classes", "seed", "seconds"), 0)
    result |= {"encoder": "trained", "value": value, "values": {}, "details": {}, "settings": {}, "changed": {}}
    result |= {"dataset_sha256": DATA, "fraction": 1.0, "split": "all", "step": 9, "checkpoint_sha256": "a"}
    return json.dumps(result | more) + "\n"


def run_folder(folder: Path, value: float, *lines: str) -> Path:
    folder.mkdir()
    newest_counts = line(0.0) + line(value) + line(99.0, encoder="raw pixels")
    (folder / "results.jsonl").write_text(newest_counts + "".join(lines))
    return folder


def tabulate(out: Path, capsys, runs: dict[tuple[str, int], Path], rows: str = "methods") -> str:
    compare.tabulate(runs, rows, out)
    return capsys.readouterr().out


def test_means_and_intervals_over_seeds(tmp_path, capsys):
    runs = {("byol", s): run_folder(tmp_path / f"a{s}", v) for s, v in enumerate((10.0, 12.0, 14.0))}
    runs["simclr", 0] = run_folder(tmp_path / "b0", 20.0)
    printed = tabulate(tmp_path / "out", capsys, runs)
    half = 4.302653 * np.std([10, 12, 14], ddof=1) / np.sqrt(3)  # Student's t for two degrees of freedom
    assert f"| byol | 12.00 ± {half:.2f} | 0, 1, 2 |" in printed
    assert "| simclr | 20.00 | 0 |" in printed
    assert (tmp_path / "out" / "table.md").read_text() == printed
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_of_a_run_started_over_the_network_that_is_there_counts(tmp_path, capsys):
    """Not the one of the most steps, which is gone; nor one that was measured last and kept under another name."""
    run = run_folder(tmp_path / "a", 96.0, line(93.0, step=5, checkpoint_sha256="b"))
    assert "| byol | 93.00 | 0 |" in tabulate(tmp_path / "out", capsys, {("byol", 0): run})
    (run / "checkpoint.pt").write_bytes(b"its weights")
    there = hashlib.sha256(b"its weights").hexdigest()
    (run / "results.jsonl").write_text(line(91.0, step=5, checkpoint_sha256=there) + line(96.0))
    assert "| byol | 91.00 | 0 |" in tabulate(tmp_path / "out", capsys, {("byol", 0): run})


def test_a_checkpoint_without_results_is_named(tmp_path, capsys):
    """The number of an earlier network does not stand for it."""
    run = run_folder(tmp_path / "a", 96.0)
    (run / "checkpoint.pt").write_bytes(b"its weights")
    with pytest.raises(UserError, match=r"checkpoint\.pt has no results"):
        tabulate(tmp_path / "out", capsys, {("byol", 0): run})


def test_a_run_without_results_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/results\.jsonl is missing"):
        tabulate(tmp_path / "out", capsys, {("byol", 0): tmp_path / "empty"})
    assert not (tmp_path / "out").exists()


def test_ablations_stand_beside_the_papers(tmp_path, capsys):
    named = {("no-norm", 0): 30.0, ("no-norm", 1): 32.0, ("baseline", 0): 40.0, ("width-half", 0): 35.0}
    runs = {row: run_folder(tmp_path / f"{row[0]}-{row[1]}", value) for row, value in named.items()}
    printed = tabulate(tmp_path / "out", capsys, runs, rows="ablations")
    assert printed.startswith("| ablation | knn | paper: ImageNet, linear | seeds |\n|---|---|---|---|\n")
    assert "| no-norm | 31.00 ± " in printed and "| 53.4 | 0, 1 |" in printed
    assert "| baseline | 40.00 | 71.4 | 0 |" in printed and "| width-half | 35.00 | – | 0 |" in printed


def test_only_the_checkpoint_that_is_there_counts(tmp_path, capsys):
    """kNN of step 21, measured before that of step 9; the linear classifier of step 9 has no place beside it."""
    later = line(50.0, step=21, checkpoint_sha256=hashlib.sha256(b"its weights").hexdigest())
    old = line(30.0) + line(60.0, protocol="linear-cached")
    run = run_folder(tmp_path / "a", 10.0, later, old)
    (run / "checkpoint.pt").write_bytes(b"its weights")
    printed = tabulate(tmp_path / "out", capsys, {("byol", 0): run})
    assert printed.splitlines()[0] == "| method | knn | seeds |" and "| byol | 50.00 | 0 |" in printed


def test_other_settings_are_other_columns(tmp_path, capsys):
    one = line(60.0, protocol="linear-cached-modified", changed={"epochs": 1, "resolution_px": 32})
    two = line(70.0, protocol="linear-cached-modified", changed={"resolution_px": 32})
    runs = {(name, 0): run_folder(tmp_path / name, 10.0, more) for name, more in (("byol", one), ("simclr", two))}
    printed = tabulate(tmp_path / "out", capsys, runs)
    assert "linear-cached, epochs 1, resolution_px 32 | linear-cached, resolution_px 32" in printed
    assert "| byol | 10.00 | 60.00 | – | 0 |" in printed and "| simclr | 10.00 | – | 70.00 | 0 |" in printed


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    other = line(12.0, dataset_sha256=DATA | {"val": "3" * 64})
    runs = {("byol", 0): run_folder(tmp_path / "a", 10.0), ("simclr", 0): run_folder(tmp_path / "c", 11.0, other)}
    with pytest.raises(UserError, match="knn was measured on other images in .*c than in .*a"):
        tabulate(tmp_path / "out", capsys, runs)


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Every command that would be run; each run gets a result, and a run called …-fails ends with 75."""
    found = []

    def run(command, cwd):
        found.append([str(part) for part in command[1:]])
        if "--name" in command:
            folder = Path(command[command.index("--name") + 1])
            run_folder(folder, 10.0)
            return subprocess.CompletedProcess(command, 75 if folder.name.startswith("ablate-cifar10-no-norm") else 0)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "RUNS", tmp_path)
    return found


def test_every_method_with_every_seed(commands, tmp_path, capsys):
    compare.main(CompareConfig("methods", ("--workers", "1"), seeds=(0, 1)))
    pretrain = [" ".join(command) for command in commands[::2]]
    assert len(pretrain) == 2 * len(METHOD_NAMES)
    first = tmp_path / "compare-cifar10-demo-barlow_twins-0"
    own = f"--preset cifar10-demo --seed 0 --name {first} --method barlow_twins"
    assert pretrain[0] == f"train/pretrain.py {own} --workers 1"
    assert commands[1] == ["scripts/eval_all.py", str(first), "--only", "knn", "cached"]
    assert (tmp_path / "compare-cifar10-demo" / "table.md").read_text() == capsys.readouterr().out


def test_every_ablation_is_one_that_can_be_trained(commands, tmp_path):
    """The trainer reads the flags and makes another recipe of each, unless it is what the card has anyway: a projector
    of three layers, a batch of 2048."""
    for card, recipes in (("cifar10-demo", 22), ("cifar10", 21), ("imagenet", 20)):
        flags = compare.ablations(card).values()
        configs = [tyro.cli(PretrainConfig, args=words.split(), default=PRESETS[card]) for words in flags]
        assert len({resolved(config).run for config in configs}) == recipes
    compare.main(CompareConfig("ablations", only=("baseline", "width-half")))
    assert commands[2][-2:] == ["--projector", "256-128"]


def test_one_that_ends_early_ends_the_comparison(commands, tmp_path):
    with pytest.raises(SystemExit) as ended:
        compare.main(CompareConfig("ablations", card="cifar10", only=("baseline", "no-norm", "predictor")))
    assert ended.value.code == 75 and len(commands) == 3
    assert not (tmp_path / "ablate-cifar10").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [({"only": ("dino",)}, "--only dino is none of the methods; there are barlow_twins"), ({"card": "x"}, "--card x")],
)
def test_what_there_is_not(commands, flags, said):
    with pytest.raises(UserError, match=said):
        compare.main(CompareConfig("methods", **flags))
    assert not commands

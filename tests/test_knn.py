"""The kNN command from flags to the line it leaves, and what all evaluations share: subject, record, errors."""

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import features as features_module
from eval import subject as subject_module
from eval.features import FeatureSet, open_encoder
from eval.knn import KnnConfig, main
from eval.subject import open_subject, read_results
from pipeline.disk import append_line
from pipeline.errors import UserError
from pipeline.storage.beton import open_beton
from tests.evaluation import AT_SIDE
from train.checkpoint import BackboneInfo, load_backbone

REPO = Path(__file__).resolve().parents[1]


def brute_force_top1(run, data, k) -> float:
    """Share of validation images whose class wins the vote: float64, one image at a time."""
    encoder = open_encoder(run)
    train, val = (open_beton(data / f"{split}.beton") for split in ("train", "val"))
    bank, queries = (FeatureSet(encoder, b, run / "oracle").read().double().numpy() for b in (train, val))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    hits = 0
    for query, label in zip(queries, val.labels, strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(train.labels[nearest], np.exp(similarity[nearest] / 0.07), minlength=5)
        hits += votes.argmax() == label
    return 100 * hits / len(queries)


def test_from_flags_to_the_line(run, data, capsys):
    result = main(KnnConfig(checkpoint=run))
    (line,) = (run / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == json.loads(json.dumps(result))
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert shown.keys() == result.keys() and shown["value"] == float(f"{result['value']:.2f}")
    assert shown["values"] == {name: float(f"{value:.2f}") for name, value in result["values"].items()}
    assert f"top1_k20 {result['value']:.2f} %: the trained test_resnet of {run}, step 9, measured on 60 " in printed.err
    assert f"protocol knn-mmselfsup-modified; written to {run}/results.jsonl\n" in printed.err
    assert "not as published are resolution_px 32\n" in printed.err
    assert f"    top1_k100    {shown['values']['top1_k100']:.2f} %\n" in printed.err
    assert result["value"] == pytest.approx(brute_force_top1(run, data, 20), abs=1e-9)
    assert result["values"]["top1_k10"] == pytest.approx(brute_force_top1(run, data, 10), abs=1e-9)
    assert 20 < result["value"] < 100, "the case decides nothing"
    expected = {
        "protocol": "knn-mmselfsup-modified",
        "metric": "top1_k20",
        "encoder": "trained",
        "arch": "test_resnet",
        "step": 9,
        "seed": 0,
        "fraction": 1.0,
        "split": "all",
        "train_images": 200,
        "val_images": 60,
        "classes": 5,
        "changed": AT_SIDE,
        "key": "",
        "data": str(data / "train.beton"),
    }
    assert {key: result[key] for key in expected} == expected
    assert result["checkpoint_sha256"] == open_encoder(run).info.sha256
    assert "top1_k200" in result["values"]


def test_lines_add_up_and_file_or_folder_name_the_same_run(run):
    main(KnnConfig(checkpoint=run))
    main(KnnConfig(checkpoint=run / "checkpoint.pt", features="pixels"))
    main(KnnConfig(checkpoint=run, fraction=0.5))
    main(KnnConfig(checkpoint=run, shots=30))
    results = read_results(run)
    assert [r["encoder"] for r in results] == ["trained", "raw pixels", "trained", "trained"]
    assert [r["train_images"] for r in results] == [200, 200, 100, 150]
    assert [r["split"] for r in results[2:]] == ["balanced-0.5-seed0", "30-shot-seed0"]
    assert [r["fraction"] for r in results] == [1.0, 1.0, 0.5, None]


def test_another_place_and_resolution(run, tmp_path):
    """A file that somebody else wrote keeps its folder as it was."""
    result = main(KnnConfig(checkpoint=run / "checkpoint.pt", out=tmp_path / "new" / "place", resolution=16))
    assert result["resolution_px"] == 16 and read_results(tmp_path / "new" / "place") == [result]
    assert [path.name for path in run.iterdir()] == ["checkpoint.pt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made or written .* name another folder for the result with --out"):
        main(KnnConfig(checkpoint=run, out=tmp_path / "file" / "in"))
    with pytest.raises(UserError, match="--resolution 0 was given, at least 1"):
        main(KnnConfig(checkpoint=run, resolution=0))


def test_without_flags_the_newest_run_and_its_data(run, tmp_path, monkeypatch):
    assert KnnConfig().checkpoint == REPO / "runs" / "latest"
    (tmp_path / "latest").symlink_to(run, target_is_directory=True)
    subject = open_subject(KnnConfig(checkpoint=tmp_path / "latest"))
    assert subject.run == subject.config.checkpoint == run.resolve(), "followed once: the link may change"
    assert subject.dataset.name.startswith("coloured")
    weights = open_encoder(run).module.state_dict()
    torch.save(weights | {"fc.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    monkeypatch.setattr(subject_module, "DATA", tmp_path)
    write_resnet(tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=f"{tmp_path}/imagenet/train.beton is missing"):
        open_subject(KnnConfig(checkpoint=tmp_path / "resnet18.pth"))


def write_resnet(path):
    """torchvision's own state dict: a file that does not say what it was trained on."""
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), path)


def test_too_few_images_to_vote(run):
    with pytest.raises(UserError, match=r"offers 10 training images at --fraction 0\.05, at least 20"):
        main(KnnConfig(checkpoint=run, fraction=0.05))
    with pytest.raises(UserError, match=r"offers 5 training images at --shots 1, at least 20"):
        main(KnnConfig(checkpoint=run, shots=1))
    assert not (run / "results.jsonl").exists()


def test_what_is_no_result_is_named_and_left_out(run, capsys):
    """Torn lines, and lines that lack what the reports read."""
    sound = main(KnnConfig(checkpoint=run))
    lacking = [{"value": 1}, sound | {"values": None}, sound | {"encoder": "a tree"}, [1]]
    lacking.append({name: value for name, value in sound.items() if name not in ("split", "seconds")})
    capsys.readouterr()
    with open(run / "results.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lacking) + '{"value": ')
    append_line(run / "results.jsonl", json.dumps(sound))
    assert read_results(run) == [sound, sound]
    said = capsys.readouterr().err
    for text in ("lacks values", "lacks encoder", "lacks split, seconds", "line 5 is torn", "line 7 is torn"):
        assert text in said
    assert said.count("left out") == 6


def test_a_line_from_before_the_resolution_was_compared(run, tmp_path):
    """It is read under the name that it would get today; at 224 px nothing changes."""
    today = main(KnnConfig(checkpoint=run))
    old = today | {"protocol": "knn-mmselfsup", "changed": {}}
    old["settings"] = {k: v for k, v in today["settings"].items() if k not in ("resolution_px", "feature_type")}
    append_line(tmp_path / "results.jsonl", json.dumps(old))
    append_line(tmp_path / "results.jsonl", json.dumps(old | {"resolution_px": 224}))
    small, published = read_results(tmp_path)
    assert small == today and (published["protocol"], published["changed"]) == ("knn-mmselfsup", {})


@pytest.mark.parametrize("written", [0, 200])
def test_a_full_disk_tears_no_other_result(run, capsys, monkeypatch, written):
    """A first result is kept, the second is torn after `written` bytes, the third follows when there is room again."""
    first = main(KnnConfig(checkpoint=run))
    capsys.readouterr()

    def full(fd, data, write=os.write):
        if written:
            return write(fd, data[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the result printed above was not kept"):
        patch.setattr(os, "write", full)
        main(KnnConfig(checkpoint=run))
    assert json.loads(capsys.readouterr().out)["value"] == first["value"], "it is printed all the same"
    third = main(KnnConfig(checkpoint=run))
    assert read_results(run) == [first, third] and "left out" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["knn", "report"])
def test_a_missing_run_is_exit_code_2_and_one_line(entry, tmp_path):
    where = [tmp_path / "nowhere"] if entry == "report" else ["--checkpoint", tmp_path / "nowhere"]
    done = subprocess.run([sys.executable, REPO / "eval" / f"{entry}.py", *where], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr and ("pretrain.py" in done.stderr or "eval/knn.py" in done.stderr)


def test_the_network_of_a_file_is_chosen_and_recorded(run, monkeypatch):
    """Two networks of one file have the same sha256: --key reaches the file, the line and the kept features."""

    @dataclass(frozen=True)
    class Keyed(BackboneInfo):
        key: str = ""

    def load(path, key="", arch=""):
        module, info = load_backbone(path)
        torch.nn.init.normal_(next(module.parameters()), std=len(key))
        return module, Keyed(**vars(info) | {"key": key})

    monkeypatch.setattr(features_module, "load_backbone", load)
    results = [main(KnnConfig(checkpoint=run, key=key)) for key in ("encoder_q", "encoder", "encoder_q")]
    assert [r["key"] for r in results] == ["encoder_q", "encoder", "encoder_q"]
    assert results[0]["values"] != results[1]["values"] and results[0]["values"] == results[2]["values"]
    assert len(list((run / "features").iterdir())) == 4


def test_a_moved_dataset_says_so(run, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert main(KnnConfig(checkpoint=run, data=moved))["dataset"] == "moved"
    (moved / "train.manifest.json").unlink()
    with pytest.raises(UserError, match=r"train\.manifest\.json"):
        main(KnnConfig(checkpoint=run, data=moved))


def test_the_protocol_of_the_readme(run, data, tmp_path):
    """eval/README.md's own example, as it stands there; its published settings, and another one."""
    (code,) = re.findall("```python\n(.*?)```", (REPO / "eval" / "README.md").read_text(), re.DOTALL)
    names = {"eval.metrics": ["rank_accuracy"], "eval.protocols": ["ON_FEATURES", "Protocol"]}
    names |= {"eval.subject": ["SubjectConfig", "open_subject", "record_result"], "train.knn_vote": ["label_ranks"]}
    names |= {"dataclasses": ["dataclass"]}
    imports = "".join(f"from {module} import {', '.join(own)}\n" for module, own in names.items())
    (tmp_path / "means.py").write_text(f"import torch\n{imports}\n{code}")
    means = runpy.run_path(str(tmp_path / "means.py"))
    result = means["main"](means["MeansConfig"](checkpoint=run))
    assert (result["protocol"], result["changed"]) == ("class-means-modified", AT_SIDE)
    encoder = open_encoder(run)
    train, val = (open_beton(data / f"{split}.beton") for split in ("train", "val"))
    x, v = (FeatureSet(encoder, b, run / "features").read().double().numpy() for b in (train, val))
    centres = np.stack([x[train.labels == c].mean(0) for c in range(5)])
    nearest = ((v[:, None] - centres) ** 2).sum(2).argmin(1)
    assert result["value"] == pytest.approx(100 * (nearest == val.labels).mean())
    result = means["main"](means["MeansConfig"](checkpoint=run, power=1.0))
    assert result["changed"] == {"power": 1.0} | AT_SIDE and len(read_results(run)) == 2

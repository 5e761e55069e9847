"""Evaluations of somebody else's encoder that is no ResNet: what runs, where it is kept, and what is said."""

import json

import pytest
import timm
import torch

from eval import detection, heads, linear, report
from eval.detection import DetectionConfig
from eval.features import open_encoder
from eval.heads import HeadsConfig
from eval.knn import KnnConfig
from eval.knn import main as knn
from eval.linear import LinearConfig
from eval.semisup import SemisupConfig
from eval.semisup import main as semisup
from eval.subject import read_results
from pipeline.errors import UserError
from scripts.eval_all import EvalAllConfig
from scripts.eval_all import main as eval_all
from tests.evaluation import write_dataset, write_run

ARCH = "timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Few images, of 32 px, which the loader enlarges to the network's side."""
    return write_dataset(tmp_path_factory.mktemp("few"), classes=2, train_each=10, val_each=4)


@pytest.fixture
def vit(tmp_path):
    """A file of a ViT of a fixed side, with the classifier that timm trained on it."""
    torch.save({"model": timm.create_model(ARCH.removeprefix("timm:")).state_dict()}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_a_vit_is_evaluated_as_a_resnet_is(vit, few, capsys):
    """Its results lie in a folder of their own, where the other commands find them."""
    given = {"checkpoint": vit, "arch": ARCH, "data": few, "workers": 1}
    results = [knn(KnnConfig(**given)), linear.main(LinearConfig(**given, cached=True, epochs=1))]
    results.append(semisup(SemisupConfig(**given, fraction=0.5, epochs=1)))
    folder = vit.with_name("vit.pth.results")
    assert read_results(folder) == results and sorted(p.name for p in vit.parent.iterdir()) == [vit.name, folder.name]
    assert {(r["arch"], r["key"], r["resolution_px"]) for r in results} == {(ARCH, "model", 224)}
    with pytest.raises(UserError, match="no stem and four stages .*; evaluate its output, by eval/linear.py"):
        heads.main(HeadsConfig(**given))
    with pytest.raises(UserError, match="layout is that of a ResNet"):
        detection.main(DetectionConfig(checkpoint=vit, arch=ARCH, export_detectron2=vit.with_name("x.pkl")))
    report.main(report.ReportConfig(runs=(vit,), data=few))
    assert (folder / "report.html").is_file()
    capsys.readouterr()
    eval_all(EvalAllConfig(run=vit, arch=ARCH, data=few, plan=True, only=("knn", "heads", "linear")))
    printed = capsys.readouterr().out
    assert f"heads                  needs a ResNet of four stages, not {ARCH}" in printed
    assert "knn                    done before" in printed and "linear                 would run" in printed


def test_a_side_that_the_network_does_not_take(vit, tmp_path):
    with pytest.raises(UserError, match=r"does not take views of 32 px \(.*\); pass --resolution 224"):
        open_encoder(vit, arch=ARCH, resolution_px=32)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "any_side.pth")
    assert open_encoder(tmp_path / "any_side.pth", arch="test_vit", resolution_px=32).info.resolution_px == 32


def test_arch_is_for_others_files(tmp_path, few):
    run = write_run(tmp_path / "run", few)
    with pytest.raises(UserError, match="--arch vit_b_16 says what somebody else's file holds"):
        open_encoder(run, arch="vit_b_16")


def test_where_no_folder_can_be_made(vit, few, tmp_path):
    vit.with_name("vit.pth.results").write_text("a file of that name")
    with pytest.raises(UserError, match=r"vit\.pth\.results cannot be made .* name another folder .* with --out"):
        knn(KnnConfig(checkpoint=vit, arch=ARCH, data=few, workers=1))
    eval_all(EvalAllConfig(run=vit, arch=ARCH, data=few, out=tmp_path / "mine", only=("knn",), workers=1))
    (result,) = read_results(tmp_path / "mine")
    assert result["checkpoint"] == str(vit) and json.dumps(result)

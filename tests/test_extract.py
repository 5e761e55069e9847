"""Features in a file: the rows, names and labels of any folder or .beton, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import safetensors
import torch

from eval.extract import ExtractConfig, main
from eval.features import FeatureSet, open_encoder
from eval.subject import encoder_facts
from pipeline.convert import ConvertConfig, convert
from pipeline.convert import main as convert_command
from pipeline.errors import UserError
from pipeline.storage.beton import open_beton
from pipeline.storage.sources.source import UNLABELLED, Source
from tests.evaluation import coloured_images


@pytest.fixture
def folder(tmp_path, imagenet_sample):
    """Real images in two folders of classes, one with a name that needs quotes in a table."""
    for i, path in enumerate(imagenet_sample[:5]):
        target = tmp_path / "images" / f"class_{i % 2}" / (f'a "{i}".JPEG' if i == 3 else path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path / "images"


def rows_of(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file, "excel-tab"))


def test_a_folders_features_are_those_of_its_beton(folder, run, tmp_path):
    convert_command(ConvertConfig(out=tmp_path / "kept" / "train.beton", source=folder, workers=1))
    beton = open_beton(tmp_path / "kept" / "train.beton")
    encoder = open_encoder(run)
    expected = FeatureSet(encoder, beton, tmp_path / "cache", workers=1).read()
    for images in (folder, beton.path):
        (tmp_path / "made").mkdir()
        to = tmp_path / "made" / "all.safetensors"
        main(ExtractConfig(checkpoint=run, images=images, to=to, workers=1))
        with safetensors.safe_open(to, "pt") as file:
            assert torch.equal(file.get_tensor("features"), expected)
            assert file.get_tensor("labels").tolist() == [0, 0, 0, 1, 1]
            about = file.metadata()
        assert json.loads(about["classes"]) == ["class_0", "class_1"]
        assert json.loads(about["encoder"]) == encoder_facts(encoder, run)
        listed = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.JPEG"))
        assert rows_of(to.with_name("all.safetensors.tsv")) == [
            ["file", "label", "class"],
            *([name, name[6], name[:7]] for name in listed),
        ]
        assert len(list(to.parent.iterdir())) == 2, "nothing else stays"
        shutil.rmtree(to.parent)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.pt"], "nor in the run folder"


def test_images_without_labels_as_npy(run, tmp_path):
    pixels = coloured_images(3, np.zeros(7, np.int64), 1)
    names, where = [f"{i}.png" for i in range(7)], tmp_path / "raw"
    none = np.zeros(7, np.int64)
    source = Source("raw", "train", UNLABELLED, names, none, where, labelled=False, pixels=pixels)
    convert(source, tmp_path / "x.beton", ConvertConfig(out=tmp_path / "x.beton", workers=1))
    main(ExtractConfig(checkpoint=run, images=tmp_path / "x.beton", to=tmp_path / "x.npy", workers=1))
    expected = FeatureSet(open_encoder(run), open_beton(tmp_path / "x.beton"), tmp_path / "cache", workers=1).read()
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.float32 and np.array_equal(found, expected.numpy())
    assert rows_of(tmp_path / "x.npy.tsv")[1:] == [[name, "", ""] for name in names]
    main(ExtractConfig(checkpoint=run, images=tmp_path / "x.beton", to=tmp_path / "x.safetensors", workers=1))
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == ["features"]


def test_a_folder_that_cannot_be_converted_leaves_nothing(run, folder, tmp_path, capfd):
    broken = next(folder.rglob("*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:400])
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="images could not be converted; the converter says why above"):
        main(ExtractConfig(checkpoint=run, images=folder, to=tmp_path / "made" / "x.npy", workers=1))
    assert "is not a readable image" in capfd.readouterr().err
    assert list((tmp_path / "made").iterdir()) == []


def test_flags_that_do_not_go_together(run, folder, tmp_path, monkeypatch):
    given = {"checkpoint": run, "images": folder, "to": tmp_path / "x.npy"}
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "val.beton").touch()
    for other, said in (
        ({"to": None}, "--images and --to go together"),
        ({"images": None}, "--images and --to go together"),
        ({"fraction": 0.1, "data": folder}, "leave out --data, --fraction"),
        ({"to": tmp_path / "x.pt"}, "ends in .safetensors or .npy"),
        ({"to": tmp_path / "nowhere" / "x.npy"}, "in a folder that can be written"),
        ({"to": tmp_path / "folder.npy"}, "give a file name"),
        ({"images": tmp_path / "kept" / "val.beton", "split": "val"}, "--split val chooses of a folder"),
        ({"images": tmp_path / "kept"}, r"is a converted dataset; give one of its files, such as .*/val\.beton"),
    ):
        with pytest.raises(UserError, match=said):
            main(ExtractConfig(**given | other))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="to run one process alone, unset RANK, WORLD_SIZE and LOCAL_RANK"):
        main(ExtractConfig(**given))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="start it without torchrun"):
        main(ExtractConfig(**given))
    assert not (tmp_path / "x.npy").exists()

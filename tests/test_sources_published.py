"""Published datasets in the exact layout of their downloads, small: the images, labels and order of others' readers."""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets as torchvision_datasets

from pipeline import constants
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.storage.beton import jpeg_bytes, open_beton
from pipeline.storage.sources import cifar
from pipeline.storage.sources.imagenet_tars import DEVKIT, TRUTH
from pipeline.storage.sources.open import open_source, split_names
from tests.test_resume import CPU, TINY
from train.flags import resolved
from train.online_knn import choose_images
from train.pretrain import EXIT_FINISHED, train
from train.run_data import loader_config

# ---- ImageNet of Kaggle, and a flat val ----

IMAGES = 3  # a class and split


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory, shared_data) -> Path:
    """Real ImageNet as unpacked into class folders: train/ and val/ of Imagenette's ten classes."""
    root = tmp_path_factory.mktemp("imagenet")
    count: dict[tuple[str, str], int] = {}
    with tarfile.open(shared_data / "imagenette-128.tar") as tar:
        for member in tar:
            synset, name = member.name.split("/")[-2:]
            split = "val" if name.startswith("ILSVRC2012_val_") else "train"
            count[split, synset] = count.get((split, synset), 0) + 1
            if member.isfile() and count[split, synset] <= IMAGES:
                (root / split / synset).mkdir(parents=True, exist_ok=True)
                (root / split / synset / name).write_bytes(tar.extractfile(member).read())
    assert len(list((root / "val").glob("*/*"))) == len(list((root / "train").glob("*/*"))) == 10 * IMAGES
    return root


def flat_copy(imagenet: Path, base: Path) -> None:
    """train/ as it is, and val/ without class folders."""
    shutil.copytree(imagenet / "train", base / "train")
    (base / "val").mkdir()
    for path in (imagenet / "val").glob("*/*"):
        shutil.copy2(path, base / "val")


def synsets_by_number(imagenet: Path) -> list[str]:
    """The class of every one of the 50,000 images; those that are not here get one of the others' classes."""
    synsets = [f"n{90_000_000 + i % 1000:08d}" for i in range(50_000)]
    for path in (imagenet / "val").glob("*/*"):
        synsets[int(path.stem[-8:]) - 1] = path.parent.name
    return synsets


def solution(imagenet: Path, to: Path) -> None:
    """Kaggle's list, in no order, with one box or two."""
    rows = [(f"ILSVRC2012_val_{i:08d}", s) for i, s in enumerate(synsets_by_number(imagenet), 1)]
    with open(to / "LOC_val_solution.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for k, (name, synset) in enumerate(reversed(rows)):
            writer.writerow([name, f"{synset} 85 1 499 272 " * (1 + k % 2)])


def devkit_files(imagenet: Path) -> dict[str, bytes]:
    synsets = synsets_by_number(imagenet)
    ids = {synset: i for i, synset in enumerate(sorted(set(synsets), reverse=True), 1)}  # in no order of the names
    table = np.zeros(len(ids), [("ILSVRC2012_ID", object), ("WNID", object)])
    for row, (synset, number) in enumerate(ids.items()):
        table[row] = number, synset
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table})
    return {"meta.mat": meta.getvalue(), TRUTH: "".join(f"{ids[synset]}\n" for synset in synsets).encode()}


def devkit_tar(imagenet: Path, to: Path) -> None:
    with tarfile.open(to / DEVKIT, "w:gz") as tar:
        for name, content in devkit_files(imagenet).items():
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def devkit_folder(imagenet: Path, to: Path) -> None:
    (to / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    for name, content in devkit_files(imagenet).items():
        (to / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(content)


def synset_list(imagenet: Path, to: Path) -> None:
    (to / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(synsets_by_number(imagenet)) + "\n")


def caffe_list(imagenet: Path, to: Path) -> None:
    """Caffe's counts the classes of train; only those of the images here, as train/ has only these."""
    classes = sorted(path.name for path in (imagenet / "train").iterdir())
    rows = [f"{path.name} {classes.index(path.parent.name)}" for path in sorted((imagenet / "val").glob("*/*"))]
    (to / "val.txt").write_text("\n".join(rows))


def named_list(imagenet: Path, to: Path) -> None:
    rows = [f"{path.name} {path.parent.name}" for path in (imagenet / "val").glob("*/*")]
    (to / "val.txt").write_text("\n".join(rows))


def require_the_same(root: Path, imagenet: Path, out: Path) -> None:
    """`root` lists what the class folders hold, by torchvision's own listing of them, and makes the same .beton."""
    assert split_names(root) == ["train", "val"]
    for split in ("train", "val"):
        source, expected = open_source(root, split), torchvision_datasets.ImageFolder(imagenet / split)
        assert source.classes == expected.classes
        assert source.labels.tolist() == expected.targets
        for name, (path, _) in zip(source.names, expected.samples, strict=True):
            assert (source.where / name).read_bytes() == Path(path).read_bytes()
    convert(ConvertConfig(source=root, out=out / "given", workers=1))
    convert(ConvertConfig(source=imagenet, out=out / "folders", workers=1))
    for split in ("train", "val"):
        given, folders = (out / name / f"{split}.beton" for name in ("given", "folders"))
        assert given.read_bytes() == folders.read_bytes()


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_imagenet(imagenet, tmp_path, given):
    root = tmp_path / "kaggle"
    flat_copy(imagenet, root / "ILSVRC/Data/CLS-LOC")
    solution(imagenet, root)
    for beside in ("ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", "ILSVRC/ImageSets/CLS-LOC/val.txt"):
        (root / beside).parent.mkdir(parents=True, exist_ok=True)
        (root / beside).write_bytes(b"ILSVRC2012_val_00000001 1")
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench\n")
    require_the_same(root / given, imagenet, tmp_path)
    assert open_source(root / given, "train").left_out["test/ beside the splits"] == 1


def test_kaggles_imagenet_whose_val_was_sorted(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path / "kaggle/ILSVRC/Data/CLS-LOC")
    require_the_same(tmp_path / "kaggle", imagenet, tmp_path)


@pytest.mark.parametrize("place", ["", "val", ".."])
@pytest.mark.parametrize("write", [solution, devkit_tar, devkit_folder, synset_list, caffe_list, named_list])
def test_a_flat_val(imagenet, tmp_path, write, place):
    root = tmp_path / "above" / "imagenet"
    flat_copy(imagenet, root)
    write(imagenet, root / place)
    if place == ".." and write in (synset_list, caffe_list, named_list):  # names that other datasets may use
        with pytest.raises(UserError, match="put LOC_val_solution.csv"):
            open_source(root, "val")
    else:
        require_the_same(root, imagenet, tmp_path)


def test_a_flat_val_alone(imagenet, tmp_path):
    flat_copy(imagenet, tmp_path)
    synset_list(imagenet, tmp_path)
    (tmp_path / "val" / "ILSVRC2012_val_00000001.xml").touch()  # where its boxes are
    assert split_names(tmp_path / "val") == ["val"]
    assert open_source(tmp_path / "val", "val").labels.tolist() == sorted(list(range(10)) * IMAGES)


def test_a_flat_val_without_labels(imagenet, tmp_path):
    flat_copy(imagenet, tmp_path)
    with pytest.raises(UserError, match=rf"val holds .* without class folders.*; put .* beside it in {tmp_path}, or"):
        convert(ConvertConfig(source=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    convert(ConvertConfig(source=tmp_path, out=tmp_path / "out", split="train", workers=1))


def test_a_val_that_is_half_sorted(imagenet, tmp_path):
    flat_copy(imagenet, tmp_path)
    solution(imagenet, tmp_path)
    shutil.copytree(imagenet / "val" / "n01440764", tmp_path / "val" / "n01440764")
    with pytest.raises(UserError, match="has images and the class folder n01440764; finish moving"):
        open_source(tmp_path, "val")


def _drop(path: Path, start: str) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(start)))


@pytest.mark.parametrize(
    ("write", "spoil", "said"),
    [
        (
            solution,
            lambda root, n: _drop(root / "LOC_val_solution.csv", f"ILSVRC2012_val_{n}"),
            "class of 1 of 30 imag",
        ),
        (
            named_list,
            lambda root, n: _drop(root / "val.txt", f"ILSVRC2012_val_{n}"),
            rf"class of 1 of 30 images .*_{0}",
        ),
        (synset_list, lambda root, n: _drop(next(root.glob("*.txt")), "n90000000"), "has 499[0-9]+ classes; a synset"),
        (
            named_list,
            lambda root, n: (root / "val.txt").write_text("ILSVRC2012_val_1.JPEG cat"),
            "names no class; down",
        ),
        (caffe_list, lambda root, n: (root / "val.txt").write_text("x.JPEG 10"), "train/ has 10 classes to count"),
        (caffe_list, lambda root, n: shutil.rmtree(root / "train"), "train/ has 0 classes to count"),
        (solution, lambda root, n: (root / "LOC_val_solution.csv").write_bytes(b"\xff\xfe\xff"), "is not a text file"),
        (solution, lambda root, n: (root / "LOC_val_solution.csv").write_text("a,b\nx\n"), "the line 'x', which names"),
        (devkit_folder, lambda root, n: next(root.rglob("meta.mat")).unlink(), "is not the devkit, or not all of it"),
        (devkit_folder, lambda root, n: next(root.rglob("meta.mat")).write_bytes(b"x" * 200), "is not the devkit, or"),
        (
            devkit_folder,
            lambda root, n: next(root.rglob(TRUTH)).write_text("1\n99999"),
            "is not the devkit, or not all",
        ),
        (devkit_folder, lambda root, n: next(root.rglob(TRUTH)).write_text("1\n2"), "has 2 classes; a synset for each"),
        (solution, lambda root, n: (root / "val/ILSVRC2012_val_00050001.JPEG").touch(), "00050001.JPEG first"),
    ],
)
def test_labels_that_do_not_fit(imagenet, tmp_path, write, spoil: Callable[[Path, str], object], said):
    flat_copy(imagenet, tmp_path)
    write(imagenet, tmp_path)
    spoil(tmp_path, next((tmp_path / "val").iterdir()).stem[-8:])
    with pytest.raises(UserError, match=said):
        open_source(tmp_path, "val")


def test_other_folders_with_such_images_are_no_flat_val(imagenet_sample, tmp_path):
    """A class folder of Imagenette has images of both splits."""
    for name in ("ILSVRC2012_val_00000001.JPEG", "n01440764_18.JPEG"):
        (tmp_path / "a").mkdir(exist_ok=True)
        shutil.copy(imagenet_sample[0], tmp_path / "a" / name)
    assert split_names(tmp_path / "a") == [] and open_source(tmp_path).classes == ["a"]


# ---- Tiny ImageNet ----


@pytest.fixture
def tiny(tmp_path, imagenet, monkeypatch) -> Path:
    """The parent of tiny-imagenet-200, with 10 classes of 3 images each."""
    folder = tmp_path / "tiny" / "tiny-imagenet-200"
    wnids = sorted(path.name for path in (imagenet / "train").iterdir())
    val = []
    for split, count in (("train", 30), ("val", 30)):
        monkeypatch.setitem(constants.LISTED_SIZES, ("tiny imagenet", split), (count, 10))
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
        for k, path in enumerate(sorted((imagenet / "train" / wnid).iterdir())):
            Image.open(path).resize((64, 64)).save(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    for k, path in enumerate(sorted((imagenet / "val").glob("*/*"), key=lambda path: path.name)):
        Image.open(path).resize((64, 64)).save(folder / "val" / "images" / f"val_{k}.JPEG")
        val.append(f"val_{k}.JPEG\t{path.parent.name}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(val))
    (folder / "test" / "images").mkdir(parents=True)
    (folder / "test" / "images" / "test_0.JPEG").write_bytes(b"no label")
    (folder / "wnids.txt").write_text("\n".join(reversed(wnids)))
    (folder / "words.txt").write_text("n01440764\ttench\n")
    return folder.parent


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(tiny, tmp_path, below):
    root, folder = tiny / below, tiny / "tiny-imagenet-200"
    assert split_names(root) == ["train", "val"]
    train = torchvision_datasets.ImageFolder(folder / "train")
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():  # as everybody sorts it
        name, wnid = line.split("\t")[:2]
        (tmp_path / "val" / wnid).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "val" / "images" / name, tmp_path / "val" / wnid)
    convert(ConvertConfig(source=root, out=tmp_path / "out", workers=1))
    for split, expected in (("train", train), ("val", torchvision_datasets.ImageFolder(tmp_path / "val"))):
        beton = open_beton(tmp_path / "out" / f"{split}.beton")
        assert beton.classes == expected.classes and beton.labels.tolist() == expected.targets
        for i, (path, _) in enumerate(expected.samples):
            assert jpeg_bytes(beton, i).tobytes() == Path(path).read_bytes()


@pytest.mark.parametrize(
    ("spoil", "split", "said"),
    [
        (lambda f: (f / "val/val_annotations.txt").unlink(), "val", "val_annotations.txt, which has the classes"),
        (lambda f: (f / "val/images/val_3.JPEG").unlink(), "val", r"differ in 1 names \(images/val_3.JPEG first\)"),
        (lambda f: _drop(f / "val/val_annotations.txt", "val_3.J"), "val", r"differ in 1 names \(images/val_3.JPEG"),
        (
            lambda f: shutil.rmtree(f / "train/n01440764"),
            "train",
            "27 images of 9 classes, tiny imagenet's train split",
        ),
        (lambda f: (f / "train/n01440764/images/n01440764_0.JPEG").unlink(), "train", "29 images of 10 classes"),
        (lambda f: (f / "val/val_annotations.txt").write_text("val_3.JPEG\n"), "val", "lines without an image and its"),
        (lambda f: (f / "wnids.txt").write_text("n01440764"), "train", "are not those of .*wnids.txt"),
    ],
)
def test_half_of_tiny_imagenet(tiny, spoil, split, said):
    spoil(tiny / "tiny-imagenet-200")
    with pytest.raises(UserError, match=said):
        open_source(tiny, split)


# ---- STL-10 ----


@pytest.fixture
def stl(tmp_path, monkeypatch) -> Path:
    """The parent of stl10_binary, with 20, 30 and 7 images."""
    folder, rng = tmp_path / "stl" / "stl10_binary", np.random.default_rng(0)
    folder.mkdir(parents=True)
    monkeypatch.setattr(constants, "STL10_IMAGES", {"train": 20, "val": 30, "unlabelled": 7})
    for name, count in (("train", 20), ("test", 30), ("unlabeled", 7)):
        (folder / f"{name}_X.bin").write_bytes(rng.bytes(count * 3 * 96 * 96))
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(
                rng.permutation(np.arange(count) % 10 + 1).astype(np.uint8).tobytes()
            )
    (folder / "class_names.txt").write_text("\n".join(constants.STL10_CLASSES) + "\n")
    return folder.parent


@pytest.mark.parametrize("below", ["", "stl10_binary"])
def test_stl10(stl, tmp_path, monkeypatch, below):
    monkeypatch.setattr(torchvision_datasets.STL10, "_check_integrity", lambda self: True)
    convert(ConvertConfig(source=stl / below, out=tmp_path / "out", workers=1))
    for split, name in (("train", "train"), ("val", "test"), ("unlabelled", "unlabeled")):
        expected = torchvision_datasets.STL10(str(stl), split=name)
        beton = open_beton(tmp_path / "out" / f"{split}.beton")
        assert beton.labelled == (split != "unlabelled")
        assert beton.classes == (expected.classes if beton.labelled else ["unlabelled"])
        assert beton.labels.tolist() == [label if label >= 0 else 0 for _, label in expected]
        for i, (image, _) in enumerate(expected):
            assert np.array_equal(jpeg_bytes(beton, i).reshape(96, 96, 3), np.asarray(image))


@pytest.mark.slow
def test_pretraining_on_stl10s_unlabelled_images(stl, tmp_path, monkeypatch, capsys):
    """Those beside them that have labels vote and are asked; a linear layer trained on those in use is not possible."""
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    convert(ConvertConfig(source=stl, out=tmp_path / "out", workers=1))
    flags = {
        "data": tmp_path / "out" / "unlabelled.beton",
        "run": str(tmp_path / "run"),
        "resolution": 32,
        "workers": 1,
    }
    config = resolved(replace(TINY, **flags, global_batch=6, epochs=1, knn_every=1, knn_images=100))
    with make_loader(loader_config(config, CPU)) as loader:
        assert train(config, CPU, loader) == EXIT_FINISHED
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["knn_images"] for line in lines if "knn_top1" in line] == [20 + 30]
    assert not any("linear_top1" in line for line in lines)
    assert capsys.readouterr().err.count("note: no online linear accuracies in this run: the images it trains on") == 1
    (bank, votes), (queries, asked) = choose_images(config)
    assert (bank.name, queries.name, len(votes), len(asked)) == ("train.beton", "val.beton", 20, 30)


def test_stl10s_pixels_stay_on_disk(stl):
    pixels = open_source(stl, "unlabelled").pixels
    while isinstance(pixels.base, np.ndarray):
        pixels = pixels.base
    assert isinstance(pixels, np.memmap)


@pytest.mark.parametrize(
    ("spoil", "split", "said"),
    [
        (lambda f: os.truncate(f / "unlabeled_X.bin", 100), "unlabelled", "has 100 bytes, published are 193536"),
        (lambda f: os.truncate(f / "test_X.bin", 900_000), "val", "has 900000 bytes, published are 829440"),
        (lambda f: (f / "train_y.bin").unlink(), "train", "train_y.bin has 0 bytes, published are 20"),
        (lambda f: (f / "train_y.bin").write_bytes(bytes(range(20))), "train", "not 2 images of each of 10 classes"),
    ],
)
def test_half_of_stl10(stl, spoil, split, said):
    spoil(stl / "stl10_binary")
    with pytest.raises(UserError, match=said):
        open_source(stl, split)


# ---- CIFAR ----


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which the owners' files are full of."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(content)

    def save_str(self, content: str) -> None:
        self.save_bytes(content.encode())

    dispatch[bytes], dispatch[str] = save_bytes, save_str


def python2_pickle(content: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


@pytest.fixture
def cifar100(tmp_path, monkeypatch) -> Path:
    """A folder with cifar-100-python and cifar-100-binary, of 300 and 100 images."""
    root, rng = tmp_path / "cifar", np.random.default_rng(0)
    python, binary = root / "cifar-100-python", root / "cifar-100-binary"
    for folder in (python, binary):
        folder.mkdir(parents=True)
    monkeypatch.setattr(constants, "CIFAR100_IMAGES", {"train": 300, "val": 100})
    names = [f"thing_{k:02d}" for k in rng.permutation(100)]
    fine_names = {b"fine_label_names": [name.encode() for name in names], b"coarse_label_names": [b"x"] * 20}
    (python / "meta").write_bytes(python2_pickle(fine_names))
    (binary / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    (binary / "coarse_label_names.txt").write_text("x\n" * 20)
    for name, count in (("train", 300), ("test", 100)):
        planes = rng.integers(0, 256, (count, 3072), np.uint8)
        fine = rng.permutation(np.arange(count) % 100)
        coarse = rng.integers(0, 20, count)
        batch = {b"data": planes, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        batch |= {b"filenames": [b"x.png"] * count, b"batch_label": b"training batch 1 of 1"}
        (python / name).write_bytes(python2_pickle(batch))
        rows = np.concatenate([coarse[:, None], fine[:, None], planes], 1).astype(np.uint8)
        (binary / f"{name}.bin").write_bytes(rows.tobytes())
    for path in python.iterdir():
        monkeypatch.setitem(constants.CIFAR_MD5, path.name, md5(path.read_bytes()).hexdigest())
    return root


@pytest.mark.parametrize(("split", "is_train"), [("train", True), ("val", False)])
def test_cifar100(cifar100, monkeypatch, split, is_train):
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "_check_integrity", lambda self: True)
    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "meta", meta)
    expected = torchvision_datasets.CIFAR100(str(cifar100), train=is_train)
    for root in (cifar100, cifar100 / "cifar-100-python", cifar100 / "cifar-100-binary"):
        assert split_names(root) == ["train", "val"]
        source = open_source(root, split)
        assert np.array_equal(source.pixels, expected.data) and source.labels.tolist() == expected.targets
        assert source.classes == expected.classes and source.kind == "cifar-100"
        assert source.names == [f"{split}/{i:05d}" for i in range(len(expected))]


def test_published_checksums_are_those_of_torchvision():
    ten, hundred = torchvision_datasets.CIFAR10, torchvision_datasets.CIFAR100
    listed = [*ten.train_list, *ten.test_list, *hundred.train_list, *hundred.test_list]
    assert dict([*listed, [hundred.meta["filename"], hundred.meta["md5"]]]) == constants.CIFAR_MD5


@pytest.mark.parametrize("name", ["train", "meta"])
def test_another_pickle_is_not_opened(cifar100, name, monkeypatch):
    path, opened = cifar100 / "cifar-100-python" / name, []

    class Recording(cifar._ArrayUnpickler):
        def __init__(self, file, **options):
            opened.append(file.getvalue())
            super().__init__(file, **options)

    monkeypatch.setattr(cifar, "_ArrayUnpickler", Recording)
    open_source(path.parent, "train")
    assert path.read_bytes() in opened
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"cannot be read .{name} is not the published file, its md5 differs"):
        open_source(path.parent, "train")
    assert path.read_bytes() not in opened


@pytest.mark.parametrize("dtype", ["O", "V8", "U3", "f8"])
def test_arrays_that_could_hold_other_things_are_refused(cifar100, dtype, monkeypatch):
    path = cifar100 / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({b"data": np.empty((300, 3072), dtype), b"fine_labels": [0]}, 2))
    monkeypatch.setitem(constants.CIFAR_MD5, "train", md5(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="an array of .* is not expected in it"):
        open_source(cifar100 / "cifar-100-python", "train")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: os.truncate(f / "train.bin", 3074 * 299),
            "has 2 to 3 images of a class and 100 names of classes; published are 3 of each of 100",
        ),
        (lambda f: os.truncate(f / "train.bin", 5000), "cannot be read"),
        (lambda f: (f / "train.bin").write_bytes(bytes(3074 * 300)), "0 to 300 images of a class"),
        (lambda f: (f / "fine_label_names.txt").write_text("cat\n" * 100), "and 1 names"),
    ],
)
def test_half_of_cifar100(cifar100, spoil, said):
    spoil(cifar100 / "cifar-100-binary")
    with pytest.raises(UserError, match=said):
        open_source(cifar100 / "cifar-100-binary", "train")


@pytest.mark.parametrize("other", ["cifar-10-batches-py/data_batch_1", "stl10_binary/train_X.bin"])
def test_a_folder_with_several_datasets(cifar100, other):
    (cifar100 / other).parent.mkdir()
    (cifar100 / other).touch()
    with pytest.raises(
        UserError, match="holds (cifar-10 and cifar-100|several datasets .cifar, stl10.); give --source"
    ):
        open_source(cifar100, "train")

"""Datasets on disk: the right images, classes and order, and clear words where something is wrong."""

import errno
import faulthandler
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from PIL import EpsImagePlugin, Image

from pipeline import constants
from pipeline.command import DATA
from pipeline.errors import UserError
from pipeline.storage import any_image, workers
from pipeline.storage.sources import folders, imagenet_tars
from pipeline.storage.sources import open as sources
from pipeline.storage.sources.open import KINDS, open_source, split_names
from pipeline.storage.sources.selection import open_splits
from pipeline.storage.sources.source import SPLITS, Source, image_places, read_image, read_stamps
from tests.mutants import COUNT, json_mutants, mutants, outcome


def write(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# ---- kinds ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_not_where_there_is_none_of_it(kind, tmp_path):
    assert [kind.find(tmp_path, split) for split in SPLITS] == [None] * len(SPLITS)


def test_a_kind_more_is_a_module_with_two_functions(tmp_path, monkeypatch):
    write(tmp_path / "pets.txt", b"b/1.jpg 1\na/2.jpg 0")
    write(tmp_path / "b" / "1.jpg", b"pixels")

    def find(root: Path, split: str) -> Path | None:
        return root / "pets.txt" if split == "val" and (root / "pets.txt").is_file() else None

    def read(root: Path, split: str, found: Path) -> Source:
        names, labels = zip(*(line.split() for line in found.read_text().splitlines()), strict=True)
        return Source("pets", split, ["a", "b"], list(names), np.array(labels, np.int64), root)

    monkeypatch.setattr(sources, "KINDS", (*KINDS, SimpleNamespace(find=find, read=read)))
    assert split_names(tmp_path) == ["val"]
    source = open_source(tmp_path, "val")
    assert source.kind == "pets" and source.labels.tolist() == [1, 0]
    assert read_image(image_places(source, 0, 1)[0])[0] == b"pixels"
    assert read_stamps(source, 2)[:, 0].tolist() == [6, -1]  # the second image's file is missing


# ---- one folder a class ----


def test_order_is_by_class_then_by_name(tmp_path):
    for name in ("b/2.jpg", "b/10.JPEG", "a/z.png", "a/sub/k.jpg", "c/1.webp"):
        write(tmp_path / name)
    for ignored in ("a/notes.txt", "a/.hidden.jpg", ".cache/1.jpg", "loose.jpg", "b/img.0001", "a/sub/Video.MP4"):
        write(tmp_path / ignored)
    for of_a_system in ("@eaDir/x.jpg", "a/@eaDir/z.png", "b/__MACOSX/2.jpg", ".DS_Store", "a/._z.png"):
        write(tmp_path / of_a_system)
    source = open_source(tmp_path)
    assert source.names == ["a/sub/k.jpg", "a/z.png", "b/10.JPEG", "b/2.jpg", "c/1.webp"]
    assert source.classes == ["a", "b", "c"] and source.labels.tolist() == [0, 0, 1, 1, 2]
    assert source.labels.dtype == np.int64
    assert dict(source.left_out) == {
        **{".txt": 1, "hidden": 2, "without suffix": 1, ".mp4": 1, "@eaDir/": 1, "__MACOSX/": 1},
        **{f"{what} beside the class folders": 1 for what in (".cache/", ".jpg", "@eaDir/", "hidden")},
    }


def test_every_suffix_that_pillow_reads_here(tmp_path):
    """Those of the formats that are read, whatever Pillow registers for them, but for films and floating point."""
    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in any_image.FORMATS}
    suffixes -= {".avifs", ".pfm", ".jpc"}
    assert suffixes <= set(folders.SUFFIXES)
    for suffix in suffixes:
        write(tmp_path / "a" / f"1{suffix.upper()}")
    assert len(open_source(tmp_path)) == len(suffixes)


def test_bytes_are_the_files(imagenet_sample):
    source = open_source(imagenet_sample[0].parents[1])
    assert [source.where / name for name in source.names] == imagenet_sample
    for i in (0, 250, 499):
        assert read_image(image_places(source, i, i + 1)[0])[0] == imagenet_sample[i].read_bytes()


def test_splits_of_a_folder(tmp_path):
    write(tmp_path / "train" / "a" / "1.jpg")
    write(tmp_path / "val" / "a" / "2.jpg")
    assert split_names(tmp_path) == ["train", "val"] and split_names(tmp_path / "train") == []
    assert open_source(tmp_path, "val").names == ["a/2.jpg"]
    with pytest.raises(UserError, match="holds splits, and --out names one file, found train and val"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_other_names_of_val(tmp_path, name):
    """They stand for val where there is train/ and no val/; what then is left beside the splits is counted."""
    write(tmp_path / name / "a" / "2.jpg")
    assert split_names(tmp_path) == []  # alone it is a class
    write(tmp_path / "train" / "a" / "1.jpg")
    for other in ("test/1.jpg", "labels.csv"):
        write(tmp_path / other)
    assert split_names(tmp_path) == ["train", "val"] and open_source(tmp_path, "val").names == ["a/2.jpg"]
    for split in ("train", "val"):
        expected = {"test/ beside the splits": 1, ".csv beside the splits": 1}
        assert dict(open_source(tmp_path, split).left_out) == expected
    write(tmp_path / "val" / "a" / "3.jpg")
    assert open_source(tmp_path, "val").names == ["a/3.jpg"]
    assert open_source(tmp_path, "train").left_out[f"{name}/ beside the splits"] == 1


def test_a_split_that_is_not_there(tmp_path):
    write(tmp_path / "train" / "a" / "1.jpg")
    with pytest.raises(UserError, match="no split 'val', found train"):
        open_source(tmp_path, "val")


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        open_source(tmp_path / "none")


def test_a_file_is_no_folder(tmp_path):
    write(tmp_path / "file.bin")
    with pytest.raises(UserError, match="is not a folder"):
        open_source(tmp_path / "file.bin")


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no class folders and no images"):
        open_source(tmp_path)


def test_a_class_without_images(tmp_path):
    write(tmp_path / "cat" / "1.jpg")
    write(tmp_path / "dog" / "readme.txt")
    with pytest.raises(UserError, match="dog has no images"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", "a\nb/c.jpg"])
@pytest.mark.parametrize("unlabelled", [False, True])
def test_names_that_break_the_file_list(tmp_path, name, unlabelled):
    write(tmp_path / "cat" / name)
    with pytest.raises(UserError, match="rename it"):
        open_splits(tmp_path, "", one_file=False, unlabelled=unlabelled)


def test_a_thousand_folders_in_each_other(tmp_path):
    """Deeper than functions may call each other."""
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1000):
            os.mkdir("d")
            os.chdir("d")
        Path("1.jpg").write_bytes(b"x")
    finally:
        os.chdir(here)
    found = outcome(lambda: open_source(tmp_path))
    assert found.names == ["d/" * 1000 + "1.jpg"] and found.classes == ["d"]
    assert read_image(image_places(found, 0, 1)[0])[0] == b"x"
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # which pytest could not


@pytest.mark.parametrize(
    "change", [{"names": ["a/\ud800"]}, {"classes": ["\ud800"]}, {"labels": np.array([1])}, {"labels": np.array([-1])}]
)
def test_names_and_labels_that_cannot_be(tmp_path, change):
    """Whatever kind of dataset they come from."""
    about = {"names": ["a/1"], "classes": ["a"], "labels": np.array([0])} | change
    with pytest.raises(UserError, match=r"ud800.* in a name|labels from -?1 to -?1 for 1 classes"):
        sources.check_names(Source("any", "train", where=tmp_path, **about))


def test_files_that_are_gone_have_no_stamp(tmp_path):
    """Nor those of a folder that is a file now, or of a tar that is gone."""
    write(tmp_path / "a" / "1.jpg")
    source = open_source(tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert read_stamps(source, 1).tolist() == [[-1, -1]]
    write(tmp_path / "a")
    assert read_stamps(source, 1).tolist() == [[-1, -1]]
    tar = replace(source, files=[tmp_path / "no.tar"], extents=np.array([[0, 512, 7]]))
    assert read_stamps(tar, 1).tolist() == [[7, -1]]


def test_names_that_are_no_utf8(tmp_path):
    (tmp_path / "cat").mkdir()
    with open(os.fsencode(tmp_path) + b"/cat/\xff.jpg", "wb") as file:
        file.write(b"content")
    source = open_source(tmp_path)
    assert read_image(image_places(source, 0, 1)[0])[0] == b"content"


# ---- ImageNet's own tar files ----


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path, monkeypatch) -> Path:
    """Both tar files and the devkit, as ImageNet lays them out, with 3 classes of 4 train and 2 val images."""
    wnids, root = ["n03", "n01", "n02"], tmp_path / "tars"
    monkeypatch.setattr(constants, "IMAGENET_CLASSES", 3)
    monkeypatch.setattr(constants, "IMAGENET_TRAIN_IMAGES", 12)
    monkeypatch.setattr(constants, "IMAGENET_VAL_IMAGES", 6)
    rng = np.random.default_rng(0)
    train = {w: {f"{w}_{k}.JPEG": rng.bytes(rng.integers(1, 3000)) for k in (30, 4, 200, 1)} for w in wnids}
    val = {f"ILSVRC2012_val_{k:08d}.JPEG": rng.bytes(rng.integers(1, 3000)) for k in range(1, 7)}
    truth = [2, 1, 3, 3, 2, 1]  # ILSVRC2012_ID of each val image; IDs count from 1 in the order of meta.mat
    write(root / "ILSVRC2012_img_train.tar", tar_of({f"{w}.tar": tar_of(files) for w, files in train.items()}))
    write(root / "ILSVRC2012_img_val.tar", tar_of(val))
    synsets = np.zeros(4, [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    for i, row in enumerate([(1, "n03", 0), (2, "n01", 0), (3, "n02", 0), (4, "n09", 2)]):
        synsets[i] = row
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)).encode(),
    }
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, content in devkit.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for wnid, files in train.items():
        for name, content in files.items():
            write(tmp_path / "folder" / "train" / wnid / name, content)
    for (name, content), number in zip(val.items(), truth, strict=True):
        write(tmp_path / "folder" / "val" / wnids[number - 1] / name, content)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_tars_are_the_unpacked_folder(tars, split):
    packed, unpacked = open_source(tars, split), open_source(tars.parent / "folder", split)
    assert packed.names == unpacked.names and packed.classes == unpacked.classes
    assert np.array_equal(packed.labels, unpacked.labels) and packed.labels.dtype == unpacked.labels.dtype
    for place, other in zip(image_places(packed, 0, 12), image_places(unpacked, 0, 12), strict=True):
        assert read_image(place)[0] == read_image(other)[0]


@pytest.mark.parametrize("names", ["Train Val", "ILSVRC2012_img_train ILSVRC2012_img_val"])
def test_folders_of_other_spellings_are_no_classes(tmp_path, names):
    train, val = names.split()
    for place in (f"{train}/n01", val):  # as ImageNet's tars unpack
        write(tmp_path / place / "a.jpg", b"")
        with pytest.raises(UserError, match=f"{train} and {val}, which look like splits" if place == val else train):
            open_source(tmp_path)
    shutil.rmtree(tmp_path / train)
    write(tmp_path / train / "a.jpg", b"")  # both of one level: classes that are called so
    assert open_source(tmp_path).classes == [train, val]


def test_a_link_that_leads_back_is_named(tmp_path):
    write(tmp_path / "a" / "1.jpg", b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="a/loop.* cannot be listed"):
        open_source(tmp_path)


def test_the_val_tar_needs_the_devkit(tars):
    (tars / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(UserError, match=r"put ILSVRC2012_devkit_t12.tar.gz beside it"):
        open_source(tars, "val")


@pytest.mark.parametrize("content", ["empty", "no gzip", "half", "other files"])
def test_a_devkit_that_is_not_whole(tars, content):
    path = tars / "ILSVRC2012_devkit_t12.tar.gz"
    whole = path.read_bytes()
    other = gzip.compress(tar_of({"readme.txt": b"x"}))
    write(path, {"empty": b"", "no gzip": b"x" * 99, "half": whole[: len(whole) // 2], "other files": other}[content])
    with pytest.raises(UserError, match=r"t12\.tar\.gz is not the devkit, or not all of it .*; download it again"):
        open_source(tars, "val")


def test_a_devkit_is_not_blamed_for_what_the_machine_refuses(tars, monkeypatch):
    def refused(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(workers, "ProcessPoolExecutor", refused)
    with pytest.raises(UserError, match=r"^1 worker processes cannot be started \(.*Too many open files"):
        open_source(tars, "val")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_a_truncated_tar(tars, split, share):
    path = tars / f"ILSVRC2012_img_{split}.tar"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError, match="download it again"):
        open_source(tars, split)


def test_files_beside_the_images_in_the_tars(tars):
    """A README in each, in the first place, and a class folder's name; they are counted."""
    for split, where in (("train", "beside the classes"), ("val", "beside the images")):
        path, before = tars / f"ILSVRC2012_img_{split}.tar", open_source(tars, split)
        path.write_bytes(tar_of({"README": b"x"})[:1024] + path.read_bytes())
        source = open_source(tars, split)
        assert source.names == before.names and source.left_out == {where: 1}
    with pytest.raises(UserError, match="5 images of 3 classes, ImageNet's val split has 6"):  # none of its number
        path.write_bytes(path.read_bytes().replace(b"val_00000003", b"val_00000030", 1))
        mend_checksums(path)
        open_source(tars, "val")


def mend_checksums(path: Path) -> None:
    """Makes the headers of a tar valid again after a change of names."""
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked, with SciPy in them, and may crash without a word."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(workers.threading, "active_count", lambda: 1)
    faulthandler.disable()
    yield
    faulthandler.enable(sys.__stderr__)


@pytest.mark.filterwarnings("ignore")  # SciPy's
@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", imagenet_tars.DEVKIT])
def test_mutated_tars(tars, forked, name, monkeypatch):
    path, split, refused = tars / name, "train" if "train" in name else "val", 0
    content, sound, count = path.read_bytes(), open_source(tars, split), COUNT
    if name == imagenet_tars.DEVKIT:
        count //= 6  # many have a process
    else:
        classes = imagenet_tars.val_classes(tars / imagenet_tars.DEVKIT)
        monkeypatch.setattr(imagenet_tars, "val_classes", lambda _: classes)
    for mutant in mutants(content, seed=0, count=count):
        path.write_bytes(mutant)
        source = outcome(lambda: open_source(tars, split))
        if isinstance(source, UserError):
            refused += 1
        else:
            assert source.names == sound.names and np.array_equal(source.labels, sound.labels)
    assert count // 6 < refused <= count


@pytest.mark.filterwarnings("ignore")  # SciPy's
@pytest.mark.parametrize("name", ["meta.mat", imagenet_tars.TRUTH])
def test_mutated_devkits(tars, forked, name, monkeypatch):
    """Unpacked, without a checksum: it is refused, or each image has a class of its list. SciPy crashes at some."""
    folder, refused = tars / "unpacked", 0
    for known, content in imagenet_tars._devkit_files(tars / imagenet_tars.DEVKIT).items():
        write(folder / known, content)
    content, sound = (folder / name).read_bytes(), imagenet_tars.val_classes(folder)
    count = COUNT // 10  # each has a process
    for mutant in mutants(content, seed=0, count=count):
        (folder / name).write_bytes(mutant)
        classes = outcome(lambda: imagenet_tars.val_classes(folder))
        refused += isinstance(classes, UserError)
        if name == imagenet_tars.TRUTH and not isinstance(classes, UserError):
            assert set(classes) <= {*sound, "n09"}
    assert count // 6 < refused <= count
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    assert "not all of it (its meta.mat); download it" in str(outcome(lambda: imagenet_tars.val_classes(folder)))


def test_a_devkit_of_absurd_size(tars):
    with gzip.open(tars / imagenet_tars.DEVKIT, "wb") as file:
        member = tarfile.TarInfo("meta.mat")
        member.size = 2**40
        file.write(member.tobuf(tarfile.GNU_FORMAT))
    assert "'meta.mat' has 1099511627776 bytes" in str(outcome(lambda: open_source(tars, "val")))


def test_something_else_named_tar(tars):
    write(tars / "ILSVRC2012_img_train.tar", np.random.default_rng(0).bytes(20000))
    with pytest.raises(UserError, match="not a tar file"):
        open_source(tars, "train")


# ---- CIFAR-10 ----


def accept(path: Path, monkeypatch) -> None:
    """Makes the checksum of a pickle the published one."""
    monkeypatch.setitem(constants.CIFAR_MD5, path.name, hashlib.md5(path.read_bytes()).hexdigest())


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> dict[str, Path]:
    """Random images in CIFAR-10's three layouts, with their checksums as the published ones."""
    rng, roots = np.random.default_rng(0), {name: tmp_path / name for name in ("pickles", "sheets", "binary")}
    for split, batches in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        pixels = rng.integers(0, 256, (len(batches) * 20, 32, 32, 3), np.uint8)
        labels = rng.integers(0, 10, len(pixels))
        for name, content in (("", pixels), ("LABELS_", labels.astype(np.uint8))):
            digest = hashlib.sha256(content.tobytes()).hexdigest()
            monkeypatch.setattr(constants, f"CIFAR10_{split.upper()}_{name}SHA256", digest)
        for batch, part, own in zip(
            batches, np.split(pixels, len(batches)), np.split(labels, len(batches)), strict=True
        ):
            planes = {b"data": part.transpose(0, 3, 1, 2).reshape(-1, 3072).copy(), b"labels": own.tolist()}
            write(roots["pickles"] / "cifar-10-batches-py" / batch, pickle.dumps(planes, 2))
            accept(roots["pickles"] / "cifar-10-batches-py" / batch, monkeypatch)
            rows = np.concatenate([own[:, None], planes[b"data"]], 1).astype(np.uint8)
            write(roots["binary"] / "cifar-10-batches-bin" / f"{batch}.bin", rows.tobytes())
            sheet = io.BytesIO()
            Image.fromarray(part.reshape(20, 1024, 3)).save(sheet, "PNG")
            write(roots["sheets"] / f"{batch}.png", sheet.getvalue())
        write(roots["sheets"] / f"{split}_lables.json", json.dumps(labels.tolist()).encode())
    return roots


@pytest.mark.parametrize(("split", "count"), [("train", 100), ("val", 20)])
def test_all_layouts_of_cifar10_are_the_same(cifar, split, count):
    first, *others = (open_source(root, split) for root in [*cifar.values(), cifar["binary"] / "cifar-10-batches-bin"])
    assert len(first) == count and first.pixels.shape == (count, 32, 32, 3)
    for other in others:
        assert np.array_equal(first.pixels, other.pixels) and np.array_equal(first.labels, other.labels)
        assert first.names == other.names and first.classes == other.classes and first.kind == other.kind
    assert first.classes[0] == "airplane" and len(first.classes) == 10


def test_other_pixels_are_refused(cifar):
    path = cifar["sheets"] / "data_batch_3.png"
    pixels = np.array(Image.open(path))
    pixels[4, 100] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match="pixels of CIFAR-10's train split"):
        open_source(cifar["sheets"], "train")
    assert len(open_source(cifar["sheets"], "val")) == 20


def test_other_labels_are_refused(cifar):
    path = cifar["sheets"] / "test_lables.json"
    labels = json.loads(path.read_text())
    path.write_text(json.dumps(labels[1:] + labels[:1]))
    with pytest.raises(UserError, match="labels of CIFAR-10's val split"):
        open_source(cifar["sheets"], "val")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"<html>", pickle.dumps({}), pickle.dumps([1])])
@pytest.mark.parametrize("accepted", [False, True])
def test_damaged_batches_are_refused(cifar, content, accepted, monkeypatch):
    path = cifar["pickles"] / "cifar-10-batches-py" / "data_batch_2"
    write(path, content)
    if accepted:
        accept(path, monkeypatch)
    with pytest.raises(UserError, match="cannot be read .data_batch_2 is not" if not accepted else "cannot be read"):
        open_source(cifar["pickles"], "train")


@pytest.mark.filterwarnings("ignore")  # of Python's own look at a pickle
@pytest.mark.parametrize("accepted", [False, True])
def test_mutated_batches(tmp_path, monkeypatch, accepted):
    """Of one image, so that what is changed is mostly the pickle's own. Whatever their checksum."""
    data, refused = np.random.default_rng(0).integers(0, 256, (1, 3072), np.uint8), 0
    path, names = tmp_path / "cifar-10-batches-py" / "test_batch", [b"image_%d.png" % i for i in range(300)]
    content = pickle.dumps({b"batch_label": b"1 of 1", b"labels": [7], b"data": data, b"filenames": names}, 2)
    write(path, content)
    write(path.with_name("data_batch_1"))
    pixels = data.reshape(1, 3, 32, 32).transpose(0, 2, 3, 1)
    monkeypatch.setattr(constants, "CIFAR10_TEST_SHA256", hashlib.sha256(pixels.tobytes()).hexdigest())
    monkeypatch.setattr(constants, "CIFAR10_TEST_LABELS_SHA256", hashlib.sha256(b"\7").hexdigest())
    accept(path, monkeypatch)
    for mutant in mutants(content, seed=0):
        path.write_bytes(mutant)
        if accepted:
            accept(path, monkeypatch)
        source = outcome(lambda: open_source(tmp_path, "val"))
        if isinstance(source, UserError):
            refused += 1
        else:
            assert np.array_equal(source.pixels, pixels) and source.labels.tolist() == [7]
    assert refused == COUNT if not accepted else 100 < refused < COUNT


@pytest.mark.filterwarnings("ignore")  # Pillow's
@pytest.mark.parametrize("name", ["test_batch.png", "test_lables.json"])
def test_mutated_sheets_and_labels(cifar, name):
    path, sound = cifar["sheets"] / name, open_source(cifar["sheets"], "val")
    content = path.read_bytes()
    for mutant in (json_mutants if name.endswith("json") else mutants)(content, seed=0):
        path.write_bytes(mutant)
        source = outcome(lambda: open_source(cifar["sheets"], "val"))
        assert isinstance(source, UserError) or np.array_equal(source.labels, sound.labels)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", None])
def test_a_sheet_that_is_another_kind_of_file(cifar, content, monkeypatch):
    """PostScript that is called .png starts no other program, and a pipe is not waited for."""
    path = cifar["sheets"] / "test_batch.png"
    path.unlink()
    if content:
        write(path, content)
    else:
        os.mkfifo(path)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    assert ("no known image format" if content else "is not a file") in str(
        outcome(lambda: open_source(cifar["sheets"], "val"))
    )


def test_other_bytes_for_c_are_refused(cifar):
    path = cifar["binary"] / "cifar-10-batches-bin" / "data_batch_2.bin"
    write(path, path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(cifar["binary"], "train")


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_batch_cannot_run_code(cifar, tmp_path, monkeypatch):
    path = cifar["pickles"] / "cifar-10-batches-py" / "data_batch_2"
    write(path, pickle.dumps(_Attack(tmp_path / "attacked")))
    accept(path, monkeypatch)  # whatever its checksum
    with pytest.raises(UserError, match="mkdir is not expected"):
        open_source(cifar["pickles"], "train")
    assert not (tmp_path / "attacked").exists()


def test_the_real_cifar10():
    """Where scripts/fetch_cifar10.py has been run: the published pixels, the published counts."""
    folder = DATA / "cifar10" / "source"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing; scripts/fetch_cifar10.py makes it")
    source = open_source(folder, "val")
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert (source.pixels.mean((0, 1, 2)) / 255).round(3).tolist() == [0.494, 0.485, 0.45]

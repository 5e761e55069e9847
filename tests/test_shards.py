"""WebDataset shards: what the standard library's tarfile reads from them, and that they are the .beton's samples."""

import hashlib
import json
import tarfile

import numpy as np
import pytest

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from pipeline.storage.beton import files_path, jpeg_bytes, open_beton
from pipeline.storage.shards import open_shards, pack_shards
from pipeline.storage.verify import verify
from tests.mutants import COUNT, json_mutants, mutants, outcome

PER_SHARD = 7  # 48 images: six full shards and one of six images


def link(small_beton, folder):
    """The small dataset in a folder of its own; its files are shared, not copied."""
    folder.mkdir(exist_ok=True)
    for name in ("train.beton", "train.manifest.json", "train.files.tsv"):
        (folder / name).symlink_to(small_beton.parent / name)
    return open_beton(folder / "train.beton")


@pytest.fixture
def beton(small_beton, tmp_path):
    return link(small_beton, tmp_path / "data")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.is_symlink()}


def test_tarfile_reads_every_sample_and_its_class(beton):
    pack_shards(beton, PER_SHARD)
    tars, seen = sorted(beton.path.parent.glob("*.tar")), []
    assert len(tars) == 7
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            assert len(members) <= 2 * PER_SHARD
            for jpg, cls in zip(members[::2], members[1::2], strict=True):
                sample = int(jpg.name.removesuffix(".jpg"))
                assert (jpg.name, cls.name) == (f"{sample:09d}.jpg", f"{sample:09d}.cls")
                assert tar.extractfile(jpg).read() == jpeg_bytes(beton, sample).tobytes()
                assert int(tar.extractfile(cls).read()) == beton.labels[sample]
                assert (jpg.mtime, jpg.uid, jpg.gid, jpg.uname) == (0, 0, 0, "")
                seen.append(sample)
    assert seen == list(range(len(beton)))


def test_reading_by_id(beton):
    shards = open_shards(pack_shards(beton, PER_SHARD))
    assert len(shards) == len(beton)
    assert shards.classes == beton.classes
    assert shards.file_names() == beton.file_names()
    for name in ("heights", "widths", "labels", "modes"):
        assert np.array_equal(getattr(shards, name), getattr(beton, name))
    for sample in range(len(beton)):
        assert np.array_equal(jpeg_bytes(shards, sample), jpeg_bytes(beton, sample))


def test_stopped_and_gone_on_with_the_bytes_are_the_same(beton, small_beton, tmp_path, monkeypatch):
    pack_shards(beton, PER_SHARD)
    whole = contents(beton.path.parent)
    other = link(small_beton, tmp_path / "other")
    from pipeline.storage import shards

    write, written = shards._write_shard, []

    def write_some(source, ids, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(source, ids, path)

    monkeypatch.setattr(shards, "_write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        pack_shards(other, PER_SHARD)
    assert not (other.path.parent / "train.shards.json").exists()
    monkeypatch.setattr(
        shards, "_write_shard", lambda source, ids, path: (written.append(path.name), write(source, ids, path))
    )
    pack_shards(other, PER_SHARD)
    assert len(written) == len(set(written)) == 7
    assert contents(other.path.parent) == whole


def test_shards_of_other_settings_are_replaced(beton):
    pack_shards(beton, 5)
    pack_shards(beton, PER_SHARD)
    assert len(list(beton.path.parent.glob("*.tar"))) == 7
    before = {path: path.stat().st_mtime_ns for path in beton.path.parent.glob("*.tar")}
    pack_shards(beton, PER_SHARD)
    assert before == {path: path.stat().st_mtime_ns for path in beton.path.parent.glob("*.tar")}


def test_the_command(imagenet_sample, tmp_path):
    for i, path in enumerate(imagenet_sample[:6]):
        target = tmp_path / "images" / f"class_{i % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    out = tmp_path / "out" / "train.beton"
    convert(  # verify reads both
        ConvertConfig(out=out, source=tmp_path / "images", format="webdataset", shard_images=4, workers=1, verify=True)
    )
    assert len(open_shards(tmp_path / "out" / "train.shards.json")) == 6
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 2
    assert not list((tmp_path / "out").glob("*.partial")) and not list((tmp_path / "out").glob("*.begun"))


def test_damage_is_named(beton):
    path = pack_shards(beton, PER_SHARD)
    folder, manifest = path.parent, path.read_text()
    with pytest.raises(UserError, match="missing; make it"):
        open_shards(folder / "none.shards.json")
    (folder / "train-000006.tar").rename(folder / "moved")
    with pytest.raises(UserError, match=r"train-000006.tar is missing"):
        open_shards(path)
    (folder / "train-000006.tar").write_bytes((folder / "moved").read_bytes()[:-1])
    with pytest.raises(UserError, match="the manifest says"):
        open_shards(path)
    (folder / "moved").rename(folder / "train-000006.tar")
    path.write_text(manifest[:-20])
    with pytest.raises(UserError, match="not a manifest"):
        open_shards(path)
    path.write_text(json.dumps(json.loads(manifest) | {"format_version": 9}))
    with pytest.raises(UserError, match="format version 9"):
        open_shards(path)
    path.write_text(manifest)
    index = bytearray((folder / "train.shards.npy").read_bytes())
    index[-1] ^= 1
    (folder / "train.shards.npy").write_bytes(index)
    with pytest.raises(UserError, match="does not belong to train.shards.json"):
        open_shards(path)


@pytest.mark.filterwarnings("ignore")  # NumPy's, about headers of Python 2
def test_mutated_indexes(beton):
    """The digest tells; where it fits, as a faulty writer's would, every image lies in its tar and has a class."""
    path = pack_shards(beton, PER_SHARD)
    index, sound, refused = path.with_name("train.shards.npy"), open_shards(path), 0
    content, about = index.read_bytes(), json.loads(path.read_text())
    for mutant in mutants(content, seed=0):
        index.write_bytes(mutant)
        path.write_text(json.dumps(about))
        assert isinstance(outcome(lambda: open_shards(path)), UserError) or mutant == content
        path.write_text(json.dumps(about | {"index_sha256": hashlib.sha256(mutant).hexdigest()}))
        opened = outcome(lambda: open_shards(path))
        if isinstance(opened, UserError):
            refused += 1
            continue
        assert len(opened) == len(sound) and set(opened.labels) <= set(range(len(opened.classes)))
        assert all(len(jpeg_bytes(opened, i)) == opened.sizes_bytes[i] > 0 for i in range(len(opened)))
    assert 150 < refused < COUNT


@pytest.mark.parametrize("with_tars", [False, True])  # as a manifest of other programs' tars has them
def test_mutated_manifests(beton, with_tars):
    path = pack_shards(beton, PER_SHARD)
    sound, about, refused = open_shards(path), json.loads(path.read_text()), 0
    if with_tars:
        about["tars"] = sorted(tar.name for tar in path.parent.glob("*.tar"))
    for mutant in json_mutants(json.dumps(about).encode(), seed=0):
        path.write_bytes(mutant)
        opened = outcome(lambda: open_shards(path))
        if isinstance(opened, UserError):
            refused += 1
            continue
        assert opened.labels.tolist() == sound.labels.tolist() and opened.classes == json.loads(mutant)["classes"]
        assert all(jpeg_bytes(opened, i).tobytes() == jpeg_bytes(sound, i).tobytes() for i in (0, 20, 47))
        names = outcome(opened.file_names)
        assert isinstance(names, UserError) or names == sound.file_names()
    assert 150 < refused < COUNT


def test_verify_names_the_changed_image(beton):
    path = pack_shards(beton, PER_SHARD)
    verify(open_shards(path), 1)
    shards = open_shards(path)
    with open(path.parent / f"train-{shards.shard[17]:06d}.tar", "r+b") as file:
        file.seek(int(shards.offsets[17] + shards.sizes_bytes[17] - 3))
        file.write(b"?")
    with pytest.raises(UserError, match=f"1 bad images of 48 .*{beton.file_names()[17]}: its bytes .*; remove"):
        verify(open_shards(path), 1)
    for damaged in (path, *path.parent.glob("*.tar")):
        damaged.unlink()
    verify(open_shards(pack_shards(beton, PER_SHARD)), 1)


def test_what_one_that_was_killed_left_goes_at_once(beton):
    for name in ("train.shards.begun", "train-000001.tar", "train.shards.npy"):
        (beton.path.parent / f".{name}.0123456789ab.tmp").write_bytes(b"half")
    pack_shards(beton, PER_SHARD)
    assert not list(beton.path.parent.glob(".*"))


def test_two_at_once(beton):
    with (
        OneWriter(beton.path.with_name("train.shards.writing"), "them"),
        pytest.raises(UserError, match=r"train\.shards\.json is being written by process"),
    ):
        pack_shards(beton, PER_SHARD)
    pack_shards(beton, PER_SHARD)


def test_the_disk_and_raw_pixels(beton, monkeypatch):
    from pipeline.storage import shards

    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="make room"):
        pack_shards(beton, PER_SHARD)
    assert not list(files_path(beton.path).parent.glob("*.tar"))
    object.__setattr__(beton, "modes", np.ones_like(beton.modes))
    with pytest.raises(UserError, match="raw pixels"):
        pack_shards(beton, PER_SHARD)

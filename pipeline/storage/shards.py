"""WebDataset shards: the JPEGs of a .beton in tar files, and the way to read both by sample id.

    x-000000.tar …      members 000000000.jpg, 000000000.cls (the class index in digits), 000000001.jpg, …
    x.shards.npy        a ROW a sample: which tar, where in it; size, label
    x.shards.json       the manifest: classes, shards, digests of the index and the file list
    x.files.tsv         the .beton's list of files: id, label, how it was stored, sha256, file name

The bytes follow from the .beton and the number of images a shard alone. Each tar gets its name when it is
complete and on the disk, the manifest comes last; stopped, the same call continues at the first missing tar.

Any WebDataset reader takes the tars one after the other. Ours maps them and goes by id, in our order. Tars of other
programs get the three other files from adopt.py; their names are then "tars" in the manifest.
"""

import glob
import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np

from pipeline.disk import whole_file, write_whole
from pipeline.errors import BAD_BYTES, UserError
from pipeline.one_writer import OneWriter
from pipeline.progress import progress
from pipeline.storage import beton
from pipeline.storage.beton import Beton, Stored, open_beton
from pipeline.storage.mapped import map_file

SUFFIX = ".shards.json"
FORMAT_VERSION = 1
BLOCK = tarfile.BLOCKSIZE
NEAR_BYTES = 256 << 10  # reading what lies between two samples so near costs less than a second read

ROW = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u8"), ("height", "<u2"), ("width", "<u2"), ("label", "<i8")]
)


@dataclass(frozen=True)
class Shards(Stored):
    """A finished set of shards; sample ids, labels and sizes are those of its .beton."""

    shard: np.ndarray  # (N,) int64, the number of the tar that holds an image
    maps: list[np.memmap]  # one uint8 array a tar, read-only

    def file_of(self, sample: int) -> tuple[Path, np.ndarray]:
        """The tar that holds an image."""
        mapped = self.maps[self.shard[sample]]
        return mapped.filename, mapped


def stored_ranges(stored: Stored, ids: np.ndarray) -> list[tuple[Path, int, int]]:
    """Where some samples, given in file order, lie: (file, start, end), neighbours in one range."""
    starts, ends = stored.offsets[ids], stored.offsets[ids] + stored.sizes_bytes[ids]
    other_file = np.diff(stored.shard[ids]) != 0 if isinstance(stored, Shards) else False
    apart = other_file | (starts[1:] - ends[:-1] > NEAR_BYTES)
    first, last = np.flatnonzero(np.r_[True, apart]), np.flatnonzero(np.r_[apart, True])
    return [(stored.file_of(ids[a])[0], int(starts[a]), int(ends[z])) for a, z in zip(first, last, strict=True)]


def _beside(path: Path, suffix: str) -> Path:
    """`x.shards.json` → `x` + suffix."""
    return path.with_name(path.name.removesuffix(SUFFIX) + suffix)


def _shard_path(path: Path, shard: int) -> Path:
    return _beside(path, f"-{shard:06d}.tar")


# ---- writing ----


def _layout(source: Beton, shard_images: int) -> tuple[np.ndarray, list[int]]:
    """Where every sample goes, before a byte is written: the index, and the size of each tar."""
    ids = np.arange(len(source))
    index = np.zeros(len(source), ROW)
    index["shard"] = ids // shard_images
    for name, values in (("bytes", source.sizes_bytes), ("height", source.heights), ("width", source.widths)):
        index[name] = values
    index["label"] = source.labels
    taken = BLOCK + -(-source.sizes_bytes // BLOCK) * BLOCK  # a header and the JPEG
    taken += 2 * BLOCK * source.labelled  # a header and the class
    sizes = []
    for first in range(0, len(source), shard_images):
        part = slice(first, first + shard_images)
        ends = np.cumsum(taken[part])
        index["offset"][part] = ends - taken[part] + BLOCK
        sizes.append(-(-(int(ends[-1]) + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
    return index, sizes


def _write_shard(source: Beton, ids: range, path: Path) -> None:
    """No time and no owner is noted, so that the same images give the same bytes."""
    with whole_file(path, alone=True) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in ids:
            label = b"%d" % source.labels[sample]
            members = [("jpg", beton.jpeg_bytes(source, sample).tobytes()), ("cls", label)]
            for suffix, data in members if source.labelled else members[:1]:
                member = tarfile.TarInfo(f"{sample:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pack_shards(source: Beton, shard_images: int) -> Path:
    """The shards of a .beton beside it; returns their manifest's path, the --data of a loader.

    Raises UserError for a .beton without JPEGs, if the disk has no room, and if another process packs them.
    """
    path = source.path.with_suffix(SUFFIX)
    if (source.modes != beton.MODE_JPEG).any():
        raise UserError(f"{source.path} holds raw pixels; shards hold JPEGs: use the .beton itself")
    with OneWriter(_beside(path, ".shards.writing"), str(path)):
        _pack(source, shard_images, path)
    return path


def _pack(source: Beton, shard_images: int, path: Path) -> None:
    index, sizes = _layout(source, shard_images)
    buffer = io.BytesIO()
    np.save(buffer, index)
    manifest = {
        "format_version": FORMAT_VERSION,
        "images": len(source),
        "classes": source.classes,
        **({} if source.labelled else {"labelled": False}),
        "shard_images": shard_images,
        "shard_bytes": sizes,
        "tables_sha256": source.manifest["tables_sha256"],
        "index_sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
        "files_sha256": source.manifest["files_sha256"],
    }
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    if path.is_file() and path.read_bytes() == content:
        print(f"{path} is already there; nothing to do")
        return
    # The manifest of the shards to come: tars beside another one's are another dataset's.
    begun = _beside(path, ".shards.begun")
    path.unlink(missing_ok=True)
    if not begun.is_file() or begun.read_bytes() != content:
        for old in path.parent.glob(glob.escape(_beside(path, "").name) + "-??????.tar"):
            old.unlink()
        write_whole(begun, content, alone=True)
    missing = [shard for shard in range(len(sizes)) if not _shard_path(path, shard).is_file()]
    needed, free = sum(sizes[shard] for shard in missing), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path.parent} has {free / 1e9:.1f} GB free, the shards need {needed / 1e9:.1f} GB more; make room and"
            " run the same command again"
        )
    for shard in progress(missing, _beside(path, "-*.tar").name, len(missing), unit="shard"):
        first = shard * shard_images
        _write_shard(source, range(first, min(first + shard_images, len(source))), _shard_path(path, shard))
    write_whole(_beside(path, ".shards.npy"), buffer.getvalue(), alone=True)
    os.replace(begun, path)
    print(f"{path}: {len(source)} images in {len(sizes)} shards, {sum(sizes) / 1e6:.1f} MB")


# ---- reading ----


def _read_index(path: Path, manifest: dict, tar_bytes: list[int]) -> np.ndarray:
    """(N,) ROW. Raises UserError for another file, and for images that do not lie in the tars or have no class."""
    index_path = _beside(path, ".shards.npy")
    content = beton.checked_bytes(index_path, path, manifest["index_sha256"])
    try:
        index = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (*BAD_BYTES, SyntaxError, TokenError) as error:
        raise UserError(f"{index_path} is not an index of shards ({type(error).__name__}); convert again") from None
    sound = index.dtype == ROW and index.shape == (manifest["images"],) and (index["shard"] < len(tar_bytes)).all()
    if sound and len(index):
        ends = np.array(tar_bytes, np.uint64)[index["shard"]]
        sound = (
            (index["offset"] <= ends).all()
            and (index["bytes"] <= ends - index["offset"]).all()
            and min(index[name].min() for name in ("bytes", "height", "width")) > 0
            and (index["label"] >= 0).all()
            and (index["label"] < len(manifest["classes"])).all()
        )
    if not (sound and len(index)):
        raise UserError(f"{index_path} does not fit {path.name} and its tars; copy all again or convert again")
    return index


def open_shards(path: Path) -> Shards:
    """Opens a finished set of shards by its manifest. Raises UserError for one with missing or damaged parts."""
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with pipeline/convert.py --format webdataset")
    expected = {"classes": list, "images": int, "shard_bytes": list}
    manifest = beton.read_manifest(
        path, FORMAT_VERSION, expected | dict.fromkeys(("tables_sha256", "index_sha256", "files_sha256"), str)
    )
    tars = manifest.get("tars", [_shard_path(path, shard).name for shard in range(len(manifest["shard_bytes"]))])
    if len(tars) != len(manifest["shard_bytes"]):
        raise UserError(f"{path} has {len(tars)} tars and {len(manifest['shard_bytes'])} sizes; convert again")
    maps = []
    for name, size in zip(tars, manifest["shard_bytes"], strict=True):
        tar = path.parent / Path(name).name
        if not os.path.isfile(tar) or tar.stat().st_size != size:
            found = f"has {tar.stat().st_size} bytes" if os.path.isfile(tar) else "is missing"
            raise UserError(f"{tar} {found}, the manifest says {size} bytes; copy it again or convert again")
        maps.append(map_file(tar))
    index = _read_index(path, manifest, [len(mapped) for mapped in maps])
    return Shards(
        path=path,
        manifest=manifest,
        classes=manifest["classes"],
        heights=index["height"].astype(np.int64),
        widths=index["width"].astype(np.int64),
        labels=index["label"].astype(np.int64),
        modes=np.full(len(index), beton.MODE_JPEG, np.uint8),
        offsets=index["offset"].astype(np.int64),
        sizes_bytes=index["bytes"].astype(np.int64),
        shard=index["shard"].astype(np.int64),
        maps=maps,
    )


def open_stored(path: Path) -> Stored:
    """A .beton, or shards by their manifest x.shards.json."""
    return open_shards(path) if path.name.endswith(SUFFIX) else open_beton(path)

"""The .beton file: FFCV's layout in plain NumPy, and a memory-mapped view of it; those of other programs, too.

    header          24 bytes: version, fields, page size, samples, where the allocation table is
    descriptors     1041 bytes a field: type, name, arguments; here an RGB image and an integer
    samples         24 bytes each: mode, width, height, where the data are; label
    (zeros up to the next page)
    pages           8 MiB each; a sample's data never cross the border of a page
    allocations     24 bytes a sample: id, where, how many bytes

FFCV's own Reader and Loader read these files. Beside `x.beton` lie `x.manifest.json` (what it is) and
`x.files.tsv` (one line a sample: id, label, how it was stored, sha256 of its bytes, file name); `open_beton`
refuses a file without them, or with those of another file. A file that another program wrote gets both from adopt.py,
and "adopted" in its manifest; its fields and pages may be others (ffcv_file.py).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.ffcv_file import ALLOCATION as ALLOCATION  # part of what this file is about
from pipeline.storage.ffcv_file import DESCRIPTOR, FFCV_VERSION, HEADER, TYPE_IMAGE, TYPE_LABEL, Tables, read_tables
from pipeline.storage.ffcv_file import MODE_JPEG as MODE_JPEG
from pipeline.storage.ffcv_file import MODE_RAW as MODE_RAW
from pipeline.storage.mapped import map_file

FORMAT_VERSION = 1  # of our manifest and file table; FFCV's own version stands in the header
PAGE_BYTES = 8 << 20  # the page size FFCV's writer uses

SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "offset", "label"],
        "formats": ["<u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
FIELDS = (("image", TYPE_IMAGE), ("label", TYPE_LABEL))
# Entries of some manifests.
_NOT_IN_ALL = {"labelled": bool, "source": dict, "identity": dict, "fields": list, "tars": list}

SAMPLES_AT = HEADER.itemsize + len(FIELDS) * DESCRIPTOR.itemsize


def manifest_path(path: Path) -> Path:
    """`x.beton` → `x.manifest.json`."""
    return path.with_suffix(".manifest.json")


def files_path(path: Path) -> Path:
    """`x.beton` or `x.shards.json` → `x.files.tsv`."""
    return path.with_name(path.name.removesuffix(".beton").removesuffix(".shards.json") + ".files.tsv")


def data_start(samples: int) -> int:
    """Offset of the first page, bytes, in a file with room for this many samples."""
    return -(-(SAMPLES_AT + samples * SAMPLE.itemsize) // PAGE_BYTES) * PAGE_BYTES


def place(end: int, size_bytes: int) -> int:
    """Where the next sample's data go when the last one's ended at `end`: there, or on the next page."""
    return end if end // PAGE_BYTES == (end + size_bytes - 1) // PAGE_BYTES else -(-end // PAGE_BYTES) * PAGE_BYTES


def head_bytes(samples: int, allocations_at: int) -> bytes:
    """Header and field descriptors."""
    header = np.zeros(1, HEADER)
    header[0] = (FFCV_VERSION, len(FIELDS), PAGE_BYTES, samples, allocations_at)
    descriptors = np.zeros(len(FIELDS), DESCRIPTOR)
    for row, (name, type_number) in zip(descriptors, FIELDS, strict=True):
        row["type"] = type_number
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return header.tobytes() + descriptors.tobytes()


def tables_sha256(head: bytes, samples: np.ndarray, allocations: np.ndarray) -> str:
    """The digest of everything in the file but the samples' own data, which `x.files.tsv` covers."""
    digest = hashlib.sha256(head)
    digest.update(samples.tobytes())
    digest.update(allocations.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Stored:
    """N images as they are stored, in a .beton file or in shards (shards.py), mapped into memory."""

    path: Path  # the .beton, or the manifest of the shards
    manifest: dict
    classes: list[str]
    heights: np.ndarray  # (N,) int64, px
    widths: np.ndarray  # (N,) int64, px
    labels: np.ndarray  # (N,) int64, index into classes
    modes: np.ndarray  # (N,) uint8, MODE_JPEG or MODE_RAW
    offsets: np.ndarray  # (N,) int64, in the file that holds the image
    sizes_bytes: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self.manifest.get("labelled", True)

    def file_names(self) -> list[str]:
        """The source file of each sample, by id, relative to the source's root. Read on each call: 1 s for ImageNet."""
        return [line[line.rindex("\t") + 1 :] for line in _file_lines(self)]

    def file_of(self, sample: int) -> tuple[Path, np.ndarray]:
        """The file that holds an image, and its bytes, uint8, read-only."""
        raise NotImplementedError


@dataclass(frozen=True)
class Beton(Stored):
    """A finished .beton file. Opening reads its tables, 50 bytes a sample, and no image. `data` is the whole file."""

    data: np.ndarray

    def file_of(self, sample: int) -> tuple[Path, np.ndarray]:
        """The one file there is."""
        return self.path, self.data


def jpeg_bytes(stored: Stored, sample: int) -> np.ndarray:
    """The stored bytes of one sample, a view into its file: a JPEG, or raw R G B pixels if its mode says so."""
    start = stored.offsets[sample]
    return stored.file_of(sample)[1][start : start + stored.sizes_bytes[sample]]


def file_rows(stored: Stored) -> list[list[str]]:
    """`x.files.tsv` by sample id: [id, label, how it was stored, sha256, file name], all text."""
    return [line.split("\t") for line in _file_lines(stored)]


def _file_lines(stored: Stored) -> list[str]:
    path = files_path(stored.path)
    content = checked_bytes(path, stored.path, stored.manifest["files_sha256"])
    lines = content.decode("utf-8", "surrogateescape").split("\n")[1:-1]
    if len(lines) != len(stored) or any(line.count("\t") != 4 for line in lines):
        raise UserError(f"{path} has {len(lines)} lines, or not 5 columns; {len(stored)} are expected, convert again")
    return lines


def checked_bytes(path: Path, belongs_to: Path, sha256: str) -> bytes:
    """The content of a file beside a dataset. Raises UserError if it is missing or not the one it was made with."""
    if not path.is_file():
        raise UserError(f"{path} is missing; it belongs to {belongs_to.name}: copy it too, or convert again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} does not belong to {belongs_to.name} (its sha256 differs); convert again")
    return content


def require_same_classes(first: str, classes: list[str], second: str, other_classes: list[str]) -> None:
    """Raises UserError if two splits, named `first` and `second`, have different classes."""
    if classes == other_classes:
        return
    extra, missing = sorted(set(other_classes) - set(classes)), sorted(set(classes) - set(other_classes))
    details = [f"{where} lacks {names[0]}" for where, names in ((first, extra), (second, missing)) if names]
    raise UserError(
        f"{first} has {len(classes)} classes and {second} has {len(other_classes)}"
        f" ({'; '.join(details) or 'in another order'}); both need the same class folders"
    )


def read_manifest(path: Path, version: int, expected: dict[str, type]) -> dict:
    """A manifest with entries of these types. Raises UserError for a file that is none, or of another version."""
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format_version"]
        kinds = expected | {key: kind for key, kind in _NOT_IN_ALL.items() if key in manifest}
        complete = all(isinstance(manifest[key], kind) for key, kind in kinds.items())
        lists = [manifest[key] for key in ("classes", "fields", "tars") if key in kinds]
        complete = complete and all(isinstance(text, str) for texts in lists for text in texts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of pipeline/convert.py ({error!r}); convert again") from None
    if found != version:
        raise UserError(f"{path} has format version {found!r}, this code reads {version}; convert again")
    if not complete:
        raise UserError(f"{path} is not a manifest of pipeline/convert.py (an entry has a wrong type); convert again")
    return manifest


def _read_manifest(path: Path) -> dict:
    """That of a .beton, both of which must be there."""
    where = manifest_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a .beton in it, as pipeline/convert.py makes them")
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with pipeline/convert.py, or give the path of another .beton")
    if not where.is_file():
        raise UserError(
            f"{path} has no {where.name} beside it, so it comes from another tool or was moved alone; make one with"
            f" pipeline/convert.py --source {path}, or move the manifest too"
        )
    expected = {"classes": list, "images": int, "bytes": int, "tables_sha256": str, "files_sha256": str}
    return read_manifest(where, FORMAT_VERSION, expected)


def open_beton(path: str | Path) -> Beton:
    """Opens a finished file. Raises UserError for one that is missing, truncated, damaged or not ours."""
    path = Path(path)
    manifest = _read_manifest(path)
    found_bytes, count = path.stat().st_size, manifest["images"]
    if found_bytes != manifest["bytes"]:
        what = "truncated" if found_bytes < manifest["bytes"] else "too long"
        raise UserError(
            f"{path} is {what}: it has {found_bytes} bytes, its manifest says {manifest['bytes']};"
            " copy it again or convert again"
        )
    tables = read_tables(path)
    if tables_sha256(tables.head, tables.samples, tables.allocations) != manifest["tables_sha256"]:
        raise UserError(
            f"{path} is not the file its manifest describes, or is damaged; copy both again or convert again"
        )
    labels, classes = tables.labels, len(manifest["classes"])
    if len(labels) != count:
        raise UserError(f"{manifest_path(path)} says {count} images, {path.name} has {len(labels)}; convert again")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path} has labels from {labels.min()} to {labels.max()}, {manifest_path(path).name} names {classes} "
            f"classes (labels 0 to {classes - 1}); copy both again or convert again"
        )
    return mapped_beton(path, tables, manifest)


def mapped_beton(path: Path, tables: Tables, manifest: dict) -> Beton:
    """A file of these tables, mapped into memory."""
    return Beton(
        path=path,
        manifest=manifest,
        classes=manifest["classes"],
        heights=tables.images["height"].astype(np.int64),
        widths=tables.images["width"].astype(np.int64),
        labels=tables.labels,
        modes=np.ascontiguousarray(tables.images["mode"]),
        offsets=tables.images["offset"].astype(np.int64),
        sizes_bytes=tables.sizes_bytes,
        data=map_file(path),
    )

"""How far the pixels of the decoders are apart: one table for every pair of them, over the same JPEGs.

    python scripts/bench/decoders.py --images DIR [--json FILE]

    libjpeg     libjpeg-turbo by TurboJPEG, the decoder of --loader fast
    pillow      Pillow's own libjpeg-turbo, the decoder of --loader torch
    dali_cpu    DALI's CPU graph of --loader dali, where DALI is installed
    dali_mixed  the same graph on the GPU, nvJPEG with its hardware decoder where there is one; where there is a GPU

DIR is a folder with one folder of JPEGs a class. They are stored byte for byte, at any size; what the converter cannot
keep (CMYK, damaged files) is encoded again first, the same for all. Differences are of 8-bit values, 0 … 255.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from pipeline.command import run_command
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.disk import write_whole
from pipeline.errors import UserError
from pipeline.loaders.dali import make_graph
from pipeline.loaders.reference import decode_pil
from pipeline.storage.beton import MODE_JPEG, Beton, jpeg_bytes, open_beton
from pipeline.storage.decode import OK, decode_rgb, free_handle, make_handle

DALI_IMAGES = 32  # in one batch of its graph


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    images: Path
    """A folder with one folder of JPEGs a class."""
    json: Path | None = None
    """Where to write the record."""


def libjpeg_images(beton: Beton) -> Iterator[np.ndarray]:
    handle = make_handle()
    for sample in range(len(beton)):
        jpeg, height, width = jpeg_bytes(beton, sample), int(beton.heights[sample]), int(beton.widths[sample])
        out = np.empty((height, width, 3), np.uint8)
        status = decode_rgb(handle, jpeg, 0, len(jpeg), MODE_JPEG, height, width, out.reshape(-1))
        assert status == OK
        yield out
    free_handle(handle)


def pillow_images(beton: Beton) -> Iterator[np.ndarray]:
    return (np.asarray(decode_pil(beton, sample)) for sample in range(len(beton)))


def dali_images(beton: Beton, device_id: int | None) -> Iterator[np.ndarray]:
    batches = [range(first, min(first + DALI_IMAGES, len(beton))) for first in range(0, len(beton), DALI_IMAGES)]
    graph = make_graph(([jpeg_bytes(beton, i) for i in ids] for ids in batches), DALI_IMAGES, 2, device_id)
    for _ in batches:
        (images,) = graph.run()
        for image in images if device_id is None else images.as_cpu():
            yield np.array(image)


def decoders(beton: Beton) -> dict[str, Iterator[np.ndarray]]:
    """Those that this machine has; each yields every image, (h, w, 3) uint8, in order."""
    found = {"libjpeg": libjpeg_images(beton), "pillow": pillow_images(beton)}
    try:
        version("nvidia-dali-cuda120")
    except PackageNotFoundError:
        return found
    found["dali_cpu"] = dali_images(beton, None)
    if torch.cuda.is_available():
        found["dali_mixed"] = dali_images(beton, torch.cuda.current_device())
    return found


def compare(found: dict[str, Iterator[np.ndarray]]) -> list[dict]:
    """For each pair of decoders: images and values that differ, the mean and the largest difference."""
    pairs = list(itertools.combinations(found, 2))
    levels, differ, images = {pair: np.zeros(256, np.int64) for pair in pairs}, dict.fromkeys(pairs, 0), 0
    for decoded in zip(*found.values(), strict=True):
        by_name, images = dict(zip(found, decoded, strict=True)), images + 1
        for pair in pairs:
            one, other = (by_name[name].astype(np.int16) for name in pair)
            assert one.shape == other.shape
            counts = np.bincount(np.abs(one - other).ravel(), minlength=256)
            levels[pair] += counts
            differ[pair] += int(counts[1:].any())
    rows = []
    for pair, counts in levels.items():
        values = int(counts.sum())
        rows.append(
            {
                "decoders": list(pair),
                "images": images,
                "images_that_differ": differ[pair],
                "values": values,
                "values_that_differ": values - int(counts[0]),
                "mean_difference_255": float(f"{counts @ np.arange(256) / values:.4g}"),
                "largest_difference_255": int(np.flatnonzero(counts)[-1]),
            }
        )
    return rows


def main(config: CompareConfig) -> None:
    if not any(config.images.glob("*/*")):
        raise UserError(f"{config.images} has no class folders with images; give the folder that holds them")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all.beton"
        convert(ConvertConfig(out, config.images, max_side=65_535, check="full", skip_unreadable=True))
        rows = compare(decoders(open_beton(out)))
    names = {"pillow": "pillow", "dali_cpu": "nvidia-dali-cuda120"}
    compared = {name for row in rows for name in row["decoders"]}
    record = {
        "versions": {package: version(package) for name, package in names.items() if name in compared},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "pairs": rows,
    }
    for row in rows:
        print(
            "{0:22s} {images_that_differ:6d} of {images} images, {1:.2e} of the values, "
            "mean {mean_difference_255:.3g}, at most {largest_difference_255} of 255".format(
                " – ".join(row["decoders"]), row["values_that_differ"] / row["values"], **row
            )
        )
    if config.json:
        write_whole(config.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(CompareConfig, main)

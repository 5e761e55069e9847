"""How fast the views are made on the CPU, beside the published recipe, after checking that they are the same.

    python scripts/bench/loader.py --images DIR [--threads 1] [--json FILE] [--checks FILE]

DIR is a folder with one folder of JPEGs a class. All candidates see the same images, read from memory, one after
the other in every repeat, on --threads cores; each figure is the mean over the repeats with its 95 % interval. Close
other programs.

    published_recipe      Pillow decodes, torchvision makes both views and normalizes them
    jpeg_decode_limit     libjpeg-turbo and nothing else, called as directly as Python can
    decode_once           the decoder of the loader: all that a core does where the GPU makes the views
    crop_only             that, then two crop-resizes, flips and normalizations
    views_cpu_parity      that with everything: the loader's work on one thread, draws included
    check_bytes           the sha256 of each image's bytes beside the noted one: the loaders' work at its first use only
    loader_fast           the same in batches, by --loader fast
    loader_ffcv           by FFCV's own Loader with our operation (--loader ffcv), where FFCV is installed
    dali_cpu              where DALI decodes on the CPU (--loader dali), where it is installed
    …_400px               the same from JPEGs of at most 400 px, quality 90 (--stored-side)
    op_<name>             one operation alone on a view of 224 px, views per second; pillow_<name> is Pillow's
"""

import ctypes
import io
import os
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from decoders import compare, libjpeg_images, pillow_images
from measure import class_images, in_turn, interval, machine, seconds_of, write_json
from operations import SIDE, OperationBench, compare_views
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from pipeline.choices.draws import draw_views, empty_params
from pipeline.command import run_command
from pipeline.compiled import jit
from pipeline.constants import IMAGENET_MEAN, IMAGENET_STD
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import Loader, make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, SOLARIZE_THRESHOLD, LoaderConfig, Normalization, ViewSpec
from pipeline.storage.beton import Beton, jpeg_bytes, open_beton
from pipeline.storage.decode import OK, decode_rgb, free_handle, make_handle
from pipeline.storage.digests import Digests
from pipeline.storage.jpeg import RGB, STRICT, turbojpeg
from pipeline.views.augment_cpu import apply_view, make_scratch, normalization_table

CROPS = (ViewSpec(p_jitter=0, p_grey=0), ViewSpec(p_jitter=0, p_grey=0))
FIRST_BATCH = """
import os, sys
from pathlib import Path
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig

loader = make_loader(LoaderConfig(Path(sys.argv[1]), BARLOW_TWINS_VIEWS, 224, global_batch=int(sys.argv[2])))
next(iter(loader.batches(0, 1)))
os._exit(0)  # without the time that ending takes
"""
SLOTS = 32  # images whose views are kept, so that writing them costs what it costs in a batch


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    images: Path
    """A folder with one folder of JPEGs a class."""
    threads: int = 1
    """Threads of the kernels; processes of the published recipe."""
    repeats: int = 5
    """How often each candidate sees all images."""
    limit: int = 300
    """Images to use, spread over the folder."""
    stored_side: int = 400
    """Measure stored JPEGs of this longest side as well, px; 0 for not."""
    json: Path | None = None
    """Where to write the speeds: a list of {name, images_per_s, ci95, repeats, threads, machine}."""
    checks: Path | None = None
    """Where to write what was compared, and the time to the first batch."""
    first_batch: bool = True
    """Measure the time from the start of a program to its first batch."""


# ---- the published recipe ----


def blurred(image: Image.Image) -> Image.Image:
    """Pillow's GaussianBlur with sigma uniform in [0.1, 2]."""
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(1).item()))


def published_view(view: ViewSpec) -> T.Compose:
    """One row of the view table with torchvision's own transforms and random numbers."""
    jitter = T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return T.Compose(
        [
            T.RandomResizedCrop(SIDE, view.area, view.ratio, InterpolationMode(view.interpolation)),
            T.RandomHorizontalFlip(view.p_flip),
            T.RandomApply([jitter], view.p_jitter),
            T.RandomGrayscale(view.p_grey),
            T.RandomApply([T.Lambda(blurred)], view.p_blur),
            T.RandomSolarize(SOLARIZE_THRESHOLD, view.p_solarize),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def run_published(path: Path, ids: np.ndarray) -> None:
    """Both views of some samples of a .beton, each decoded once by Pillow."""
    torch.set_num_threads(1)
    beton, transforms = open_beton(path), [published_view(view) for view in BARLOW_TWINS_VIEWS]
    for sample in ids:
        image = Image.open(io.BytesIO(jpeg_bytes(beton, sample).data)).convert("RGB")
        for transform in transforms:
            transform(image)


# ---- ours ----


@jit
def _decode_and_view(handle, data, table, ids, params, lut, pixels, scratch, out):
    """Decodes each sample once and makes out.shape[1] views of it; returns how many were decoded."""
    offsets, sizes, modes, heights, widths = table
    for b in range(len(ids)):
        i = ids[b]
        height, width = heights[i], widths[i]
        if decode_rgb(handle, data, offsets[i], sizes[i], modes[i], height, width, pixels) != OK:
            return b
        image = pixels[: height * width * 3].reshape(height, width, 3)
        for v in range(out.shape[1]):
            apply_view(image, params, b, v, True, lut, scratch, out[b % len(out), v])
    return len(ids)


class Worker:
    """What one thread needs for the images of some .beton files."""

    def __init__(self, betons: list[Beton]) -> None:
        self.handle = make_handle()
        height, width = (max(int(getattr(b, name).max()) for b in betons) for name in ("heights", "widths"))
        self.scratch = make_scratch(height, width, SIDE)
        self.pixels = np.empty(max(int((b.heights * b.widths).max()) for b in betons) * 3, np.uint8)
        self.out = np.empty((SLOTS, 2, SIDE, SIDE, 3), np.float32)
        self.lut = normalization_table(Normalization())

    def views(self, beton: Beton, ids: np.ndarray, views: tuple[ViewSpec, ...]) -> None:
        """Decodes and makes two views, or none."""
        sizes = beton.heights[ids], beton.widths[ids]
        params = draw_views(0, 0, ids, *sizes, views, SIDE) if views else empty_params(0, 0)
        out = self.out if views else self.out[:, :0].copy()
        table = (beton.offsets, beton.sizes_bytes, beton.modes, beton.heights, beton.widths)
        done = _decode_and_view(self.handle, beton.data, table, ids, params, self.lut, self.pixels, self.scratch, out)
        assert done == len(ids)

    def raw_decode(self, beton: Beton, ids: np.ndarray) -> None:
        decompress, to, base = turbojpeg().tjDecompress2, self.pixels.ctypes.data, beton.data.ctypes.data
        for i in ids:
            source = ctypes.cast(base + int(beton.offsets[i]), ctypes.c_char_p)
            size = int(beton.widths[i]), 0, int(beton.heights[i])
            assert decompress(int(self.handle[0]), source, int(beton.sizes_bytes[i]), to, *size, RGB, STRICT) == 0

    def close(self) -> None:
        free_handle(self.handle)


# ---- measuring ----


def link_some(images: Path, folder: Path, limit: int) -> Path:
    """Links to `limit` files spread over an image folder, in the same class folders."""
    files = class_images(images)
    for i in np.unique(np.linspace(0, len(files) - 1, limit).astype(int)):
        target = folder / files[i].parent.name / files[i].name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(files[i].resolve())
    return folder


def store(images: Path, out: Path, max_side: int) -> Beton:
    """The folder as a .beton; JPEGs that need no resize are kept byte for byte."""
    convert(ConvertConfig(out=out, source=images, max_side=max_side, quality=90, skip_unreadable=True))
    return open_beton(out)


def check_decoder(beton: Beton) -> dict:
    """Raises AssertionError unless every image decodes to Pillow's pixels."""
    (found,) = compare({"libjpeg": libjpeg_images(beton), "pillow": pillow_images(beton)})
    assert not found["values_that_differ"], f"libjpeg-turbo decodes to other pixels than Pillow: {found}"
    return {"images": found["images"], "differ": found["images_that_differ"]}


def record(name: str, speeds: np.ndarray, config: BenchConfig, about: str) -> dict:
    of = interval(speeds, 1)
    measured = {"name": name, "images_per_s": of["mean"], "ci95": of["ci95"], "repeats": len(speeds)}
    threads = 1 if name.startswith(("op_", "pillow_")) else config.threads
    return measured | {"threads": threads, "machine": about}


def first_batch_s(path: Path, images: int) -> dict[str, float]:
    """Seconds from the start of a program to its first batch of 32, imports included, with and without compiling."""
    command = [sys.executable, "-c", FIRST_BATCH, path, str(min(images, 32))]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        run = partial(subprocess.run, command, env=environment, capture_output=True, check=True)
        return {name: round(seconds_of(run), 1) for name in ("nothing_compiled", "compiled")}


def candidates_of(betons: dict[str, Beton], workers: list[Worker], threads: ThreadPoolExecutor, processes) -> dict:
    """name → (what to run, images or None for all)."""

    def on_threads(method, beton, *arguments):
        shares = np.array_split(np.arange(len(beton)), len(workers))
        return lambda: list(threads.map(lambda w, ids: getattr(w, method)(beton, ids, *arguments), workers, shares))

    def checks(digests, beton):
        shares = np.array_split(np.arange(len(beton)), len(workers))
        return lambda: list(threads.map(lambda ids: all(map(digests.match, ids)), shares))

    def published(beton):
        shares = np.array_split(np.arange(len(beton)), len(workers))
        if processes is None:
            return lambda: run_published(beton.path, shares[0])
        return lambda: list(processes.map(run_published, [beton.path] * len(shares), shares))

    candidates = {}
    for suffix, beton in betons.items():
        if not suffix:
            candidates["published_recipe"] = published(beton), None
        candidates["jpeg_decode_limit" + suffix] = on_threads("raw_decode", beton), None
        candidates["decode_once" + suffix] = on_threads("views", beton, ()), None
        candidates["crop_only" + suffix] = on_threads("views", beton, CROPS), None
        candidates["views_cpu_parity" + suffix] = on_threads("views", beton, BARLOW_TWINS_VIEWS), None
        candidates["check_bytes" + suffix] = checks(Digests(beton), beton), None
    return candidates


def loader_candidates(beton: Beton, threads: int) -> tuple[list[Loader], dict]:
    """The loaders that are installed, to be closed; and of each its pass over all images in batches of SLOTS."""
    loaders, candidates = [], {}
    config = LoaderConfig(beton.path, BARLOW_TWINS_VIEWS, SIDE, SLOTS, shuffle=False, workers=threads)
    for name, backend in (("loader_fast", "fast"), ("loader_ffcv", "ffcv"), ("dali_cpu", "dali")):
        try:
            loaders.append(make_loader(replace(config, backend=backend)))
        except UserError as error:
            print(f"note: left out: {error}", file=sys.stderr)
            continue
        candidates[name] = (lambda loader=loaders[-1]: deque(loader.batches(), maxlen=0)), None
    return loaders, candidates


def print_speeds(records: list[dict]) -> None:
    recipe = next(r["images_per_s"] for r in records if r["name"] == "published_recipe")
    for r in records:
        beside = "" if r["name"].startswith(("op_", "pillow_")) else f"{r['images_per_s'] / recipe:6.2f} × the recipe"
        print(f"{r['name']:28s} {r['images_per_s']:10.1f} ± {r['ci95']:<8.1f} {beside}")


def main(config: BenchConfig) -> None:
    if config.repeats < 2 or config.threads < 1 or config.limit < 1:
        raise UserError("--repeats must be at least 2, --threads and --limit at least 1")
    cores = sorted(os.sched_getaffinity(0))
    if config.threads > len(cores):
        raise UserError(f"--threads {config.threads}: this process may use {len(cores)} cores; give at most that many")
    about = machine("pillow", "torch", "numba")
    os.sched_setaffinity(0, cores[: config.threads])  # DALI has threads of its own beside those it is told to use
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(config.threads) as threads:
        chosen = link_some(config.images, Path(folder) / "images", config.limit)
        betons = {"": store(chosen, Path(folder) / "original.beton", 65_535)}
        if config.stored_side:
            betons[f"_{config.stored_side}px"] = store(chosen, Path(folder) / "stored.beton", config.stored_side)
        checks = {"machine": about, "decoder": check_decoder(betons[""]), "views": compare_views(betons[""])}
        for row in checks["views"]:
            counts = "{operation:14s} {values:11d} values, {values_that_differ} differ".format(**row)
            print(f"{counts}, at most by {row['largest_difference_255']} of 255")
        if max(row["mean_difference_255"] for row in checks["views"]) > 0.5:
            raise UserError("the kernels' views are not Pillow's (see above), so their speed means nothing; mend them")
        if config.first_batch:
            checks["first_batch_s"] = first_batch_s(betons[""].path, len(betons[""]))
            print(f"first batch after {checks['first_batch_s']} s")
        workers = [Worker(list(betons.values())) for _ in range(config.threads)]
        context = get_context("forkserver")
        processes = ProcessPoolExecutor(config.threads, context) if config.threads > 1 else None
        candidates = candidates_of(betons, workers, threads, processes) | OperationBench(betons[""]).candidates()
        loaders, made = loader_candidates(betons[""], config.threads)
        candidates |= made
        turns = {name: partial(seconds_of, run) for name, (run, _) in candidates.items()}
        *_, seconds = in_turn(turns, config.repeats)
        for loader in loaders:
            loader.close()
        for worker in workers:
            worker.close()
        if processes:
            processes.shutdown()
        images = len(betons[""])
    speeds = {name: (candidates[name][1] or images) / np.array(values) for name, values in seconds.items()}
    records = [record(name, values, config, about) for name, values in speeds.items()]
    print_speeds(records)
    write_json(config.json, records)
    write_json(config.checks, checks)


if __name__ == "__main__":
    run_command(BenchConfig, main)

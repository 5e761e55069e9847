"""Says what bounds the training on this machine, and which flag to change.

    python scripts/doctor.py      names the machine and the versions, for a report of a fault
    python scripts/doctor.py --data data/imagenet [--arch resnet50] [--resolution 224] [--seconds 2]

Each stage runs alone on real images of the dataset, the CPU's on one core:

    read           JPEG bytes from the disk, not from the page cache
    decode         libjpeg-turbo                                  crop    both crop-resizes
    views          both views whole, as the CPU makes them
    to_device      decoded pixels into GPU memory                 views_gpu    both views, as the GPU makes them
    train          one update of the network, not compiled, on the GPU where there is one

The answer assumes that cores add up and that stages overlap, as they do in the loaders. Close other programs.
"""

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench.measure import GB, machine, seconds_of

from pipeline.choices.draws import draw_views
from pipeline.command import run_command
from pipeline.errors import UserError
from pipeline.spec import BARLOW_TWINS_VIEWS, Normalization, ViewSpec
from pipeline.storage.beton import Beton, open_beton
from pipeline.storage.decode import OK, decode_rgb, make_handle
from pipeline.views.augment_cpu import make_scratch, normalization_table, views_of_images
from train.config import PretrainConfig
from train.distributed import Ranks
from train.flags import resolved
from train.run_data import train_beton
from train.runlog import PACKAGES, installed_version
from train.update import make_update

CHUNK = 32  # images a call of a stage gets
CROPS = (ViewSpec(p_jitter=0, p_grey=0), ViewSpec(p_jitter=0, p_grey=0))


@dataclass(frozen=True)
class DoctorConfig:
    """What to look at."""

    data: Path | None = None
    """A folder with train.beton, or a .beton file: the --data of train/pretrain.py. Without it nothing is measured."""
    arch: str = "resnet50"
    """The network of the train stage."""
    projector: str = "8192-8192-8192"
    """Its projector."""
    resolution: int = 224
    """Side of the views, px."""
    rank_batch: int = 32
    """Images of a forward and backward pass; give what one GPU gets."""
    seconds: float = 2.0
    """How long each stage is timed, at least."""


@dataclass(frozen=True)
class Machine:
    """What the answer depends on beside the times."""

    cores: int
    gpu: bool
    file_bytes: int
    memory_bytes: int  # what the page cache can have

    @property
    def fits(self) -> bool:
        """Whether the page cache can hold the file."""
        return self.file_bytes < self.memory_bytes


class Answer(NamedTuple):
    """What bounds the training, and by how much: images per second of each part of the machine."""

    bound: str
    images_per_s: dict[str, float]
    cores_needed: int
    words: list[str]


class Stages:
    """The stages of one dataset: a table of names and functions of sample ids; `before` runs untimed before each."""

    def __init__(self, beton: Beton, config: DoctorConfig) -> None:
        self.beton, self.config = beton, config
        self.handle, self.table = make_handle(), normalization_table(Normalization())
        self.scratch = make_scratch(int(beton.heights.max()), int(beton.widths.max()), config.resolution)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.views = np.empty((2, CHUNK, config.resolution, config.resolution, 3), np.float32)
        self.ids, self.pixels, self.starts = np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.int64)
        train_step = make_train_step(config, Ranks(0, 1, self.device, None))
        self.run: dict[str, Callable[[np.ndarray], None]] = {
            "read": self.read,
            "decode": self.decode,
            "crop": lambda ids: self.cpu_views(CROPS),
            "views": lambda ids: self.cpu_views(BARLOW_TWINS_VIEWS),
            "train": lambda ids: train_step(),
        }
        if self.device.type == "cuda":
            self.run |= {"to_device": self.to_device, "views_gpu": self.gpu_views}

    def images(self, name: str) -> int:
        """Images that one call of a stage works on."""
        return self.config.rank_batch if name == "train" else CHUNK

    def before(self, name: str, ids: np.ndarray) -> None:
        """What a stage finds: the disk's pages out of the page cache, or decoded pixels."""
        if name == "read":
            with open(self.beton.path, "rb") as file:
                for start, size in self._places(ids):
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
        elif name not in ("decode", "train") and not np.array_equal(ids, self.ids):
            self.decode(ids)

    def _places(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Where each image's bytes begin in the file, and how many there are."""
        return [(int(self.beton.offsets[i]), int(self.beton.sizes_bytes[i])) for i in ids]

    def read(self, ids: np.ndarray) -> None:
        """The images' bytes, from the disk."""
        with open(self.beton.path, "rb", buffering=0) as file:
            for start, size in self._places(ids):
                os.pread(file.fileno(), size, start)

    def decode(self, ids: np.ndarray) -> None:
        """All pixels, one image behind the other in `pixels`, each from its place in `starts` on."""
        b = self.beton
        sizes = b.heights[ids] * b.widths[ids] * 3
        ends = np.cumsum(sizes)
        self.ids, self.starts = ids, ends - sizes
        if len(self.pixels) < ends[-1]:
            self.pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()
        for sample, start, end, place in zip(ids, self.starts, ends, self._places(ids), strict=True):
            size = int(b.heights[sample]), int(b.widths[sample])
            if decode_rgb(self.handle, b.data, *place, int(b.modes[sample]), *size, self.pixels[start:end]) != OK:
                raise UserError(f"image {sample} of {b.path} cannot be decoded; see pipeline/convert.py --verify")

    def params(self, views: tuple[ViewSpec, ...]):
        """The views' parameters of the decoded images, and the images' heights and widths."""
        heights, widths = self.beton.heights[self.ids], self.beton.widths[self.ids]
        return draw_views(0, 0, self.ids, heights, widths, views, self.config.resolution), heights, widths

    def cpu_views(self, views: tuple[ViewSpec, ...]) -> None:
        """The views of the decoded images, by the CPU's kernels."""
        params, heights, widths = self.params(views)
        bicubic = np.ones(len(views), bool)
        views_of_images(
            self.pixels, self.starts, heights, widths, params, bicubic, self.scratch, self.table, 0, self.views
        )

    def to_device(self, ids: np.ndarray) -> None:
        """The decoded pixels to the GPU."""
        self.on_device = torch.from_numpy(self.pixels).to(self.device, non_blocking=True)
        torch.cuda.synchronize()

    def gpu_views(self, ids: np.ndarray) -> None:
        """Both views of the decoded images, by the GPU's kernels."""
        from pipeline.views.augment_gpu import make_views
        from pipeline.views.gpu_plan import plan_views

        params, heights, widths = self.params(BARLOW_TWINS_VIEWS)
        plan = plan_views(params, self.starts, heights, widths, ["bicubic"] * 2, self.config.resolution)
        make_views(torch.from_numpy(self.pixels).to(self.device), plan.to(self.device), Normalization(), torch.float32)
        torch.cuda.synchronize()


def make_train_step(config: DoctorConfig, ranks: Ranks) -> Callable[[], None]:
    """One update with a batch of noise, as the trainer makes it by default, but not compiled: that takes minutes."""
    card = PretrainConfig(
        arch=config.arch,
        projector=config.projector,
        resolution=config.resolution,
        global_batch=config.rank_batch,
        activations="all",
        compile=False,
    )
    update, shape = make_update(resolved(card), ranks), (config.rank_batch, 3, config.resolution, config.resolution)
    views = tuple(torch.rand(shape, device=ranks.device).to(memory_format=torch.channels_last) for _ in range(2))

    def step() -> None:
        update(views)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(stages: Stages, seconds: float) -> dict[str, float]:
    """Seconds an image of each stage: at least two calls, the first of which warms up and does not count."""
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, len(stages.beton), CHUNK) for _ in range(64)]
    times = {}
    for name, run in stages.run.items():
        spent, calls = 0.0, -1
        while calls < 1 or (spent < seconds and calls < len(chunks) - 1):
            ids = chunks[calls + 1]
            stages.before(name, ids)
            took_s = seconds_of(partial(run, ids))
            if calls >= 0:
                spent += took_s
            calls += 1
        times[name] = spent / (calls * stages.images(name))
    return times


# ---- the answer ----


ADVICE = {
    "read": "read in long blocks, --order blocks; or store smaller images: convert with --max-side 400; or put the file"
    " on a faster disk, or give the machine more memory",
    "decode": "give the loader more cores (--workers), or store smaller images: convert with --max-side 400",
    "decode_gpu": "decode on the GPU: --loader dali; or store smaller images: convert with --max-side 400",
    "crop": "give the loader more cores (--workers), or store smaller images: convert with --max-side 400",
    "colour and blur": "give the loader more cores (--workers)",
    "to_device": "ship JPEGs instead of pixels: --loader dali",
    "views_gpu": "give the loader more cores and let them make the views: --views-on cpu",
    "train": "the data path is fast enough; only the network can be made faster: --compile, a GPU, more GPUs",
}


def answer(times: dict[str, float], machine: Machine) -> Answer:
    """Which part of the machine bounds the training: pure arithmetic on seconds an image.

    With a GPU the CPU decodes and the GPU makes the views, which is the loader's default; without one the views and
    the network share the cores, so that the larger of their shares is the bound.
    """
    cpu_parts: dict[str, float] = {"decode": times["decode"]}
    if not machine.gpu:
        cpu_parts |= {"crop": times["crop"], "colour and blur": max(times["views"] - times["crop"], 0.0)}
    cpu_s = sum(cpu_parts.values())
    step_parts: dict[str, float] = {name: times[name] for name in ("train", "views_gpu") if name in times}
    rates = {"cpu": machine.cores / cpu_s, "train": 1 / sum(step_parts.values())}
    if machine.gpu:
        rates["to_device"] = 1 / times["to_device"]
    if not machine.fits:
        rates["read"] = 1 / times["read"]
    slowest = min(rates, key=lambda name: rates[name])
    parts = {"cpu": cpu_parts, "train": step_parts}.get(slowest) or {slowest: 0.0}
    bound = max(parts, key=lambda name: parts[name])
    needed = math.ceil(rates["train"] * cpu_s)
    return Answer(bound, rates, needed, _words(bound, rates, needed, times, machine))


def _words(bound: str, rates: dict[str, float], needed: int, times: dict[str, float], machine: Machine) -> list[str]:
    named = {"read": "the disk", "to_device": "the copy to the GPU", "train": "the network's updates"}
    named["views_gpu"] = "making the views on the GPU"
    what, rate = named.get(bound, bound), min(rates.values())
    if machine.gpu:
        together = f"{needed} CPU cores keep this GPU busy; there are {machine.cores}"
        limit = min(rates.values())
    else:
        limit = 1 / (1 / rates["cpu"] + 1 / rates["train"])
        share = rates["train"] / (rates["cpu"] + rates["train"])
        together = (
            f"without a GPU the loader and the network share the {machine.cores} cores, {share:.0%} for the loader"
        )
    advice = ADVICE["decode_gpu" if machine.gpu and bound == "decode" else bound]
    size, memory = machine.file_bytes / GB, machine.memory_bytes / GB
    cache = f"the file ({size:.1f} GB) fits the page cache ({memory:.1f} GB): the disk counts in the first epoch only"
    if not machine.fits:
        cache = f"the file ({size:.1f} GB) does not fit the page cache ({memory:.1f} GB): every epoch reads the disk"
    elif 1 / times["read"] < limit:
        cache += f", which it holds to {1 / times['read']:.0f} images/s"
    digits = 0 if limit >= 10 else 1
    return [
        f"What bounds this machine: {what}, at {rate:.{digits}f} images/s; all together about {limit:.{digits}f}.",
        f"Cores: {together}.",
        f"Memory: {cache}.",
        f"To change it: {advice}.",
    ]


def this_machine(path: Path) -> Machine:
    """The cores, the GPU and the memory here, for a dataset in `path`."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024  # what the page cache has now counts as available
    return Machine(len(os.sched_getaffinity(0)), torch.cuda.is_available(), path.stat().st_size, available)


def main(config: DoctorConfig) -> None:
    """Names the machine; with a dataset also measures, and prints the times and the answer."""
    if config.seconds <= 0 or config.rank_batch < 2 or config.resolution < 1:
        raise UserError("--seconds must be above 0, --rank-batch at least 2, --resolution at least 1")
    # No names of hosts, users or folders: people put this into public reports.
    here = machine(*filter(installed_version, ("barlow-at-speed", *PACKAGES)))
    print(f"{here}, PyTorch for CUDA {torch.version.cuda}, {platform.platform()}", flush=True)
    if config.data is None:
        return print("Give --data FOLDER to measure what bounds the training on this machine.")
    beton = open_beton(train_beton(config.data.expanduser().resolve()))
    stages = Stages(beton, config)
    times = measure(stages, config.seconds)
    for name, seconds in times.items():
        where = "" if name in ("read", "to_device", "views_gpu", "train") else " a core"
        print(f"{name:10s} {1e3 * seconds:9.3f} ms an image, {1 / seconds:9.0f} images/s{where}")
    for line in answer(times, this_machine(beton.path)).words:
        print(line)


if __name__ == "__main__":
    run_command(DoctorConfig, main)

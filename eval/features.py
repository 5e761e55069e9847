"""Frozen encoder → features (N, D) of a dataset's centre views, extracted once and kept on disk.

    .beton ──loader──▶ centre views (B, 3, H, W) ──encoder, eval mode──▶ (B, D) ──▶ (N, D), row i = ids[i]
                                                                          │
                                       <run folder>/features/<hash>.safetensors, written whole or not at all

A large set is extracted in parts of whole batches, each kept as it is done: an interrupted extraction continues, and
eval/extract.py shares the parts among ranks. Parts do not change a batch, and so not a bit.

The hash covers everything that decides the numbers: the checkpoint's sha256, which of its networks, the dataset's
digest, the ids, the view, the stage, the type. The same description stands inside the file and is compared on reading,
so that features of another checkpoint are never used, however a file came to its name (eval/kept.py).
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eval.kept import FEATURES_VERSION, keep_features, read_features
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.progress import progress
from pipeline.spec import CentreCrop, LoaderConfig, Squash, centre_view
from pipeline.storage.beton import Stored
from train.checkpoint import BackboneInfo, load_backbone
from train.launch import own_gpu
from train.model import make_backbone, require_side
from train.run_data import dataset_sha256

KINDS = ("raw pixels", "untrained", "trained")  # what an Encoder can be, as tables list them
EXTRACT_BATCH = 128  # at 224 px; more where the images are smaller, so that a batch is as much work
EXTRACT_BATCH_MOST = 256
PART_BATCHES = 128  # of one part: some seconds of a GPU, minutes of a CPU
PIXELS_MAX_PX = 32  # raw pixels as features are taken at this side at most: 3072 numbers an image


@dataclass(frozen=True)
class Encoder:
    """What is evaluated. `module` maps (B, 3, H, W) to (B, D), lies on `device` and is in evaluation mode.

    kind    "trained", "untrained" (random weights, or a checkpoint of step 0), "raw pixels" (the module only flattens)
    stage   whose pooled map the module gives, in place of the network's own output (eval/frozen.py); "" for none
    """

    kind: str
    module: nn.Module
    info: BackboneInfo
    device: str
    stage: str = ""


def open_encoder(
    checkpoint: Path,
    *,
    pixels: bool = False,
    random_seed: int | None = None,
    resolution_px: int | None = None,
    key: str = "",
    arch: str = "",
) -> Encoder:
    """The encoder of a run folder or checkpoint file, on this rank's GPU where there is one.

    The file is opened once: `info.sha256` is of the very bytes whose weights these are. An evaluation calls this once,
    because a training may replace the file at any time. With `pixels` the checkpoint only says how large the views are
    and how they are normalized; with `random_seed` also which architecture gets random weights. `resolution_px`
    replaces the views' side; `key` names one of several networks in the file, and `arch` what network that is, where it
    is no ResNet. Raises UserError, also for a side that the network does not take.
    """
    if not checkpoint.exists():
        raise UserError(
            f"there is no checkpoint at {checkpoint}; make one with `torchrun train/pretrain.py`, "
            "or point --checkpoint at a run folder or a checkpoint file"
        )
    module, info = load_backbone(checkpoint, key, arch)
    info = replace(info, resolution_px=resolution_px or info.resolution_px)
    kind = "untrained" if info.data and info.step == 0 else "trained"
    if pixels:
        side = min(info.resolution_px, PIXELS_MAX_PX)
        kind, module = "raw pixels", nn.Flatten()
        info = replace(info, arch="pixels", stem="", features=3 * side * side, resolution_px=side)
    elif random_seed is not None:
        kind, module, info = "untrained", *random_encoder(info, random_seed)
    require_side(module, info.arch, info.resolution_px)
    device = f"cuda:{own_gpu(torch.cuda.device_count())}" if torch.cuda.is_available() else "cpu"
    return Encoder(kind, module.eval().to(device).to(memory_format=torch.channels_last), info, device)


def random_encoder(info: BackboneInfo, seed: int) -> tuple[nn.Module, BackboneInfo]:
    """The architecture of `info` before any training, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, _ = make_backbone(info.arch, info.stem)
    return module, replace(info, step=0, epochs=0, seed=seed, sha256=random_sha256(info, seed))


def random_sha256(info: BackboneInfo, seed: int) -> str:
    """What a result calls the random weights of an architecture in place of a checkpoint's sha256."""
    return sha256(f"random weights of {info.arch}, {info.stem} stem, seed {seed}".encode()).hexdigest()


def extract_batch(resolution_px: int) -> int:
    """Images of one forward pass. Fixed by the resolution alone, as it may decide the last bits of the features."""
    return max(1, min(EXTRACT_BATCH_MOST, EXTRACT_BATCH * 224**2 // resolution_px**2))


def centre_loader_config(
    encoder: Encoder, data: Path, ids: np.ndarray | None, backend: str, workers: int
) -> LoaderConfig:
    """One pass over the centre views of `ids` (None: of all), in their order."""
    return LoaderConfig(
        data=data,
        views=centre_view(encoder.info.resolution_px),
        resolution_px=encoder.info.resolution_px,
        global_batch=extract_batch(encoder.info.resolution_px),
        shuffle=False,
        ids=ids,
        normalization=encoder.info.normalization,
        backend=backend,
        workers=workers,
        device=encoder.device,
    )


@torch.no_grad()
def extract_features(encoder: Encoder, config: LoaderConfig, dtype: torch.dtype) -> torch.Tensor:
    """Features of the config's samples, fresh: (N, D) of `dtype` on the CPU, in the order of its ids."""
    with make_loader(config) as loader:
        features, at = torch.empty(loader.images, encoder.info.features, dtype=dtype), 0
        for batch in progress(loader.batches(), "features", loader.steps_per_epoch, unit="batch"):
            rows = encoder.module(batch.views[0])
            features[at : at + len(rows)] = rows
            at += len(rows)
    if not features.isfinite().all():
        raise UserError(
            f"the encoder's features are not all finite numbers ({encoder.info.arch}, step {encoder.info.step}); "
            "the run has diverged or float16 overflows: choose another checkpoint, or float32"
        )
    return features


@dataclass(frozen=True)
class FeatureSet:
    """Features of `ids` (None: of all) of a dataset's file: what decides them, and the folder where they are kept.

    `squash`: of the whole images, squashed into the view, in place of centre crops.
    Raw pixels are not kept: reading them again is as fast.
    """

    encoder: Encoder
    beton: Stored
    cache: Path
    ids: np.ndarray | None = None
    backend: str = "fast"
    workers: int = 0
    dtype: torch.dtype = torch.float32
    squash: bool = False

    @property
    def view(self) -> CentreCrop:
        """What the encoder sees of an image."""
        centre = centre_view(self.encoder.info.resolution_px)
        return Squash(centre.resize_px, centre.interpolation) if self.squash else centre

    @functools.cached_property
    def loading(self) -> LoaderConfig:
        """What loads the views."""
        centre = centre_loader_config(self.encoder, self.beton.path, self.ids, self.backend, self.workers)
        return replace(centre, views=self.view)

    @functools.cached_property
    def description(self) -> str:
        """Everything that decides the numbers, as JSON; it stands in the file as well."""
        info, loading = self.encoder.info, self.loading
        about = {
            "version": FEATURES_VERSION,
            "checkpoint_sha256": info.sha256,
            "key": info.key,
            "arch": info.arch,
            "stem": info.stem,
            "dataset_sha256": dataset_sha256(self.beton),
            "ids_sha256": "all" if self.ids is None else sha256(self.ids.astype("<i8").tobytes()).hexdigest(),
            "view": asdict(self.view),
            "resolution_px": loading.resolution_px,
            # fast's features were kept as ffcv's before it had a name of its own; both loaders give the same bits.
            "loader": "ffcv" if loading.backend == "fast" else loading.backend,
            "normalization": [list(loading.normalization.mean), list(loading.normalization.std)],
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": loading.global_batch,
        }
        # Only where they are not the usual ones, so that features which were kept before there was a choice are found.
        about |= {"squash": True} if self.squash else {}
        about |= {"stage": self.encoder.stage} if self.encoder.stage else {}
        return json.dumps(about, sort_keys=True)

    @property
    def path(self) -> Path:
        """The file they are kept in."""
        return self.cache / f"{sha256(self.description.encode()).hexdigest()[:32]}.safetensors"

    def parts(self, rank: int = 0, world_size: int = 1) -> Iterator[torch.Tensor]:
        """This rank's parts in order, each (n, D): read where they are kept, else extracted and kept."""
        ids = np.arange(len(self.beton)) if self.ids is None else self.ids
        images = PART_BATCHES * self.loading.global_batch
        starts = range(0, len(ids), images)
        for number in range(rank, len(starts), world_size):
            path = self.path.with_name(f"{self.path.stem}.part{number:05d}")
            description = f"{self.description} part {number}"
            part = read_features(path, description)
            if part is None:
                loading = replace(self.loading, ids=ids[starts[number] : starts[number] + images])
                part = extract_features(self.encoder, loading, self.dtype)
                if len(starts) > 1 or world_size > 1:
                    keep_features(path, description, part)
            yield part

    def read(self) -> torch.Tensor:
        """(N, D) of `dtype` on the CPU, row i = ids[i]: as they are kept, else extracted and kept."""
        if self.encoder.kind == "raw pixels":
            return extract_features(self.encoder, self.loading, self.dtype)
        kept = read_features(self.path, self.description)
        if kept is not None:
            return kept
        images = len(self.beton) if self.ids is None else len(self.ids)
        features, at = torch.empty(images, self.encoder.info.features, dtype=self.dtype), 0
        for part in self.parts():  # written into one array, so that a large set is not in memory twice
            features[at : at + len(part)] = part
            at += len(part)
        keep_features(self.path, self.description, features)
        for part_file in self.cache.glob(f"{self.path.stem}.part*"):
            part_file.unlink(missing_ok=True)
        return features

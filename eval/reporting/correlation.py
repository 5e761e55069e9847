"""What the loss saw: some training images, both views of them, and the cross-correlation matrix of their embeddings.

The views are those of the run's own first batches, by the loader of train/run_data.py. The network is the
checkpoint's, with its projector, in evaluation mode; every embedding dimension is then normalized over all the images
taken, as the loss does.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.reporting.charts import Charts, matrix
from eval.reporting.facts import config_from
from eval.reporting.page import PARTS, Section, left_out, picture, whose
from pipeline.choices.order import steps_per_epoch
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import LoaderConfig, Normalization
from pipeline.storage.decode_pil import decode_pil
from pipeline.storage.shards import SUFFIX as SHARDS
from pipeline.storage.shards import open_stored
from train.checkpoint import Stored, newest_or_refuse
from train.config import PretrainConfig
from train.distributed import Ranks
from train.methods.barlow_twins import cross_correlation
from train.methods.choose import make_method
from train.methods.contract import Method
from train.model import make_backbone
from train.resuming import load_part_, refuse_other_images
from train.run_data import dataset_sha256, loader_config, train_beton

IMAGES, IMAGES_LARGE_ON_CPU = 1024, 128  # a ResNet-50 at 224 px takes a second for ten images on two cores
LARGE_PX = 96
BATCH = 128
SHOWN_VIEWS = 8
SHOWN_DIMENSIONS = 256  # of the matrix


@dataclass(frozen=True)
class Correlation:
    """What is shown of a network, and which one it is.

    originals   the stored images; pairs: their (view 1, view 2), each (H, W, 3) uint8
    matrix      (D, D) float32; images: how many it is made of
    checkpoint_sha256, step     of the network
    """

    checkpoint_sha256: str
    step: int
    originals: list[Image.Image]
    pairs: list[tuple[np.ndarray, np.ndarray]]
    matrix: np.ndarray
    images: int

    @property
    def diagonal_mean(self) -> float:
        """1 where both views' embeddings agree in every dimension."""
        return float(self.matrix.diagonal().mean())

    @property
    def off_diagonal_rms(self) -> float:
        """0 where the dimensions are uncorrelated."""
        d = len(self.matrix)
        squares = np.square(self.matrix, dtype=np.float64).sum() - np.square(self.matrix.diagonal(), dtype=float).sum()
        return float(np.sqrt(squares / max(1, d * (d - 1))))


def load_method(checkpoint: Stored) -> tuple[Method, PretrainConfig]:
    """The whole pretrained network of a run's checkpoint, in evaluation mode on the CPU. Raises UserError."""
    state, path, _ = checkpoint
    if not state["config"]:
        raise UserError("the checkpoint does not tell how it was trained, so its projector cannot be rebuilt")
    config = config_from(state["config"], path)
    method = make_method(*make_backbone(config.arch, config.stem), config)
    load_part_(method, state["model"], "model", path, "choose another checkpoint")
    return method.eval(), config


def shown_loader_config(config: PretrainConfig, device: torch.device) -> LoaderConfig:
    """What loads the run's images, in its order and with its views, on this machine and a few at a time.

    The run's flags of where and how fast do not count here; only shards need the decoder that can read them.
    """
    loading = loader_config(config, Ranks(0, 1, device, None))
    return replace(
        loading,
        global_batch=min(BATCH, loading.global_batch),
        backend="dali" if loading.data.name.endswith(SHARDS) else "fast",
        views_on="auto",
        view_type=torch.float32,
        workers=0,
    )


def shown_pixels(view: torch.Tensor, normalization: Normalization) -> np.ndarray:
    """Normalized views (B, 3, H, W) → (B, H, W, 3) uint8."""
    std, mean = (torch.tensor(v)[:, None, None] for v in (normalization.std, normalization.mean))
    pixels = (view.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def correlate(run: Path) -> Correlation:
    """Embeds the views of at most IMAGES images of the run's first batches. Raises UserError where that cannot be."""
    checkpoint = newest_or_refuse(run)
    state, path, sha256 = checkpoint
    method, config = load_method(checkpoint)
    stored = open_stored(train_beton(config.data))
    refuse_other_images(state, config.data, dataset_sha256(stored), path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = method.to(device).to(memory_format=torch.channels_last)
    loading = shown_loader_config(config, device)
    large_on_cpu = device.type == "cpu" and loading.resolution_at(0) >= LARGE_PX
    embeddings: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    originals: list[Image.Image] = []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    with make_loader(loading) as loader:
        # The run's first epoch leaves out what does not fill one of its own batches.
        seen = steps_per_epoch(loader.images, config.global_batch) * config.global_batch
        images = min(IMAGES_LARGE_ON_CPU if large_on_cpu else IMAGES, seen)
        for batch in loader.batches(0, images // loading.global_batch):
            for kept, view in zip(embeddings, batch.views, strict=True):
                kept.append(method.projector(method.backbone(view)).float())
            if not pairs:
                shown = (shown_pixels(view[:SHOWN_VIEWS], loading.normalization) for view in batch.views)
                pairs = list(zip(*shown, strict=True))
                originals = [decode_pil(stored, int(sample)) for sample in batch.sample[:SHOWN_VIEWS]]
    z1, z2 = (torch.cat(parts) for parts in embeddings)
    if not (z1.isfinite().all() and z2.isfinite().all()):
        raise UserError("the embeddings are not all finite numbers: the run has diverged")
    # A dimension that never varies has no correlation: it stays 0 instead of being divided by 0.
    z1, z2 = ((z - z.mean(0)) / z.std(0, correction=0).clamp(min=1e-6) for z in (z1, z2))
    correlation = cross_correlation(z1, z2).cpu().numpy()
    return Correlation(sha256, state["step"], originals, pairs, correlation, len(z1))


def of_correlation(run: Path, shown: dict | None, charts: Charts) -> list[Section]:
    """The sections about what the loss saw; one that says why where that cannot be made. `shown`: a result, if any."""
    try:
        if run.suffix == ".results":  # eval/folder.py
            raise UserError("the file of somebody else's encoder has neither its projector nor its views")
        c = correlate(run)
    except UserError as error:
        return [left_out("Views and correlation matrix", error)]
    rows = [
        [picture(original, f"image {i}"), *(picture(view, f"image {i}, view {v}") for v, view in enumerate(pair, 1))]
        for i, (original, pair) in enumerate(zip(c.originals, c.pairs, strict=True), 1)
    ]
    of = c.checkpoint_sha256, c.step
    named = whose(shown or dict(zip(("checkpoint_sha256", "step"), of, strict=True)), of)
    d = min(SHOWN_DIMENSIONS, len(c.matrix))
    return [
        ("Originals and both views", PARTS.views(rows, named)),
        ("Correlation matrix", PARTS.matrix(matrix(c.matrix[:d, :d], charts), c, d, named)),
    ]

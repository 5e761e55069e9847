"""The images that a run trains on: their file, its digest, and the one way to make the run's loader.

The trainer and whatever looks at "the run's own batches" afterwards call `loader_config`, so that both see the same.
"""

import hashlib
from pathlib import Path

import torch

from pipeline.choices.order import rank_batch
from pipeline.choices.subsets import balanced_subset
from pipeline.errors import UserError
from pipeline.spec import LoaderConfig
from pipeline.storage.beton import Stored
from pipeline.storage.shards import open_stored
from train.config import AMP, NORMALIZATIONS, PretrainConfig, order_blocks, resolution_rows
from train.distributed import Ranks
from train.methods.choose import view_table


def train_beton(data: Path) -> Path:
    """The training file that --data means."""
    path = data if data.name.endswith((".beton", ".shards.json")) else data / "train.beton"
    if not path.is_file():
        raise UserError(
            f"no {path.name} in {path.parent}; make it with pipeline/convert.py "
            "(scripts/convert_imagenet.sh for ImageNet), or point --data at a folder that holds it"
        )
    return path


def dataset_sha256(stored: Stored) -> str:
    """One digest of all pixels, labels and names, made from the manifest's: the same for a .beton and its shards."""
    return hashlib.sha256((stored.manifest["tables_sha256"] + stored.manifest["files_sha256"]).encode()).hexdigest()


def view_type(config: PretrainConfig, device: torch.device) -> torch.dtype:
    """The type of the views' values: on a GPU what autocast rounds them to before the first layer."""
    return AMP[config.amp] if device.type == "cuda" else torch.float32


def refuse_long_queue(config: PretrainConfig, images: int) -> None:
    """Raises UserError where MoCo's queue holds more keys than there are images: each then meets its own older key."""
    if config.queue > images:
        raise UserError(
            f"--queue {config.queue} is longer than the dataset ({images} images), so every image would be told apart"
            f" from itself; give at most {images}"
        )


def loader_config(config: PretrainConfig, ranks: Ranks) -> LoaderConfig:
    """What loads this rank's share of the run's batches. Raises UserError for data or a batch that cannot work."""
    rank_batch(config.global_batch, ranks.world_size)
    data, ids = train_beton(config.data), None
    if config.fraction != 1:
        ids = balanced_subset(config.seed, open_stored(data).labels, config.fraction)
    return LoaderConfig(
        data=data,
        views=view_table(config),
        resolution_px=config.resolution,
        resolutions=resolution_rows(config.resolution_schedule),
        global_batch=config.global_batch,
        seed=config.seed,
        ids=ids,
        blocks=order_blocks(config),
        on_bad_image=config.on_bad_image,
        check_bytes=config.check_bytes,
        normalization=NORMALIZATIONS[config.views],
        rank=ranks.rank,
        world_size=ranks.world_size,
        backend=config.loader,
        workers=config.workers,
        device=str(ranks.device),
        views_on=config.views_on,
        view_type=view_type(config, ranks.device),
    )

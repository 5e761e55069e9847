"""A small dataset and a run folder for the tests of the evaluations."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.convert import ConvertConfig, convert
from pipeline.spec import Normalization
from pipeline.storage.sources.source import Source
from train.cards import PRESETS
from train.checkpoint import BackboneInfo, save_checkpoint
from train.config import PretrainConfig, as_plain
from train.methods.choose import make_method
from train.model import make_backbone
from train.runstate import backbone_info

ARCH = "test_resnet"  # timm's smallest residual network: 0.4 M parameters, 96 features
NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SIDE_PX = 32
AT_SIDE = {"resolution_px": SIDE_PX}  # what every result here changes of its protocol, which is at 224 px


def coloured_images(seed: int, labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, 32, 32, 3) uint8: every class has its own colour, under noise that leaves some images doubtful."""
    colours = np.random.default_rng(7).uniform(60, 195, (classes, 1, 1, 3))
    noise = np.random.default_rng(seed)
    shift = noise.normal(0, 12, (len(labels), 1, 1, 3))
    pixels = colours[labels] + shift + noise.normal(0, 40, (len(labels), SIDE_PX, SIDE_PX, 3))
    return pixels.clip(0, 255).round().astype(np.uint8)


def write_split(path: Path, labels: np.ndarray, classes: list[str], seed: int, names=None) -> np.ndarray:
    """Makes one .beton of raw pixels and returns them."""
    pixels = coloured_images(seed, labels, len(classes))
    names = names or [f"{classes[y]}/{i:05d}.png" for i, y in enumerate(labels)]
    source = Source("raw", path.stem, classes, names, np.asarray(labels, np.int64), path.parent, pixels=pixels)
    convert(source, path, ConvertConfig(out=path, workers=1))
    return pixels


def write_dataset(folder: Path, classes: int = 5, train_each: int = 40, val_each: int = 12) -> Path:
    """A folder with train.beton and val.beton."""
    names = [f"class_{i}" for i in range(classes)]
    for split, each, seed in (("train", train_each, 1), ("val", val_each, 2)):
        write_split(folder / f"{split}.beton", np.arange(classes * each) % classes, names, seed)
    return folder


def write_run(folder: Path, data: Path, seed: int = 0, step: int = 9, arch: str = ARCH) -> Path:
    """A run folder with the checkpoint of a network that has seen no image, whatever `step` says."""
    generator = torch.get_rng_state()
    torch.manual_seed(seed)
    backbone, features = make_backbone(arch)
    torch.set_rng_state(generator)
    info = asdict(BackboneInfo(arch, "imagenet", features, SIDE_PX, NORMALIZATION, str(data), seed, step, epochs=1))
    del info["sha256"]
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    save_checkpoint(
        folder,
        {"config": {}, "backbone": info, "step": step, "images": 1, "model": weights, "optimizer": {}, "scaler": {}},
    )
    return folder


def write_state(
    folder: Path, data: Path, seed: int = 0, step: int = 9, images_sha256: str = "", **changes
) -> PretrainConfig:
    """A run folder's checkpoint as the trainer leaves it, of a network that has seen no image."""
    config = replace(PRESETS["cifar10-demo"], data=data, run=str(folder), arch=ARCH, projector="24-16")
    config = replace(config, global_batch=128, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone, features = make_backbone(ARCH)
        method = make_method(backbone, features, config)
    folder.mkdir(exist_ok=True)
    info = asdict(backbone_info(config, features, step, dataset_sha256=images_sha256))
    parts = {"model": method.state_dict(), "optimizer": {}, "scaler": {}}
    save_checkpoint(folder, {"config": as_plain(config), "backbone": info, "step": step, "images": 200, **parts})
    return config

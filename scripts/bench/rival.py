"""Barlow Twins by this project and by lightly's own parts, an epoch of each in turn: what accuracy, in what time?

    python scripts/bench/rival.py --data data/cifar10 --images data/cifar10/source --out results/rival/cifar10
    python scripts/bench/rival.py --data data/imagenette --images DIR --resolution 64 --out results/rival/imagenette

    ours    train/update.py's update and the default loader, as the trainer runs them
    theirs  lightly's loss, LARS and BYOLTransform, torchvision's images, PyTorch's DataLoader (rival_lightly.py)

Both have the same initial weights, recipe (`pretrain_config`), schedule, autocast, memory format, cores and views:
crop, flip, jitter, grey, solarize. Ours crops bilinearly here, as lightly does, so that the views have one
distribution; the loss is float32 outside the autocast on both sides. What differs is the draws, and LARS: ours divides
by ‖g + wd · p‖, as the published code, lightly's by ‖g‖ + wd · ‖p‖, and it leaves a weight without a gradient alone.

Nothing of one side runs while the other is timed. Timed is each side's start, with what it alone imports, and its
epochs; not what ours alone needs once, the conversion of the images and, if an earlier command did it, the compilation
of the kernels (half a minute, otherwise in the first epoch); nor the checkpoints and the nearest-neighbour accuracy,
that of eval/knn.py with all training images.

After each pair of epochs both states are written, and the same command continues there (ours with the same bits,
lightly's with other draws). At its end a run leaves seed-N.json in --out, and a table and a picture of all seeds there.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, write_json
from rival_lightly import Theirs
from rival_table import SIDES, draw, summary, table
from torch import nn

from eval.features import Encoder, centre_loader_config, extract_features
from eval.metrics import knn_accuracy
from pipeline.command import DATA, run_command
from pipeline.disk import whole_file, write_whole
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.progress import say_line
from pipeline.spec import CIFAR_VIEWS
from pipeline.storage.shards import open_stored
from train.cards import PRESETS
from train.config import PretrainConfig, as_plain, recipe
from train.distributed import start_ranks
from train.knn_vote import KNN_HEADLINE
from train.run_data import dataset_sha256, loader_config, train_beton
from train.runstate import backbone_info
from train.update import make_update

KNN_EVERY = 5  # epochs


@dataclass(frozen=True)
class RivalConfig:
    """What both train on, and how long."""

    images: Path
    """The images of --data before their conversion, for lightly: CIFAR-10's files, or a folder with train/<class>/."""
    out: Path
    """Folder of one setting: gets the state and the record of each seed, the table and the picture of all."""
    data: Path = DATA / "cifar10"
    """The converted images: a folder with train.beton and val.beton."""
    epochs: int = 50
    """Epochs of each side."""
    seed: int = 0
    """Decides the initial weights of both, and each side's own draws."""
    resolution: int = 32
    """Side of the views, px."""
    arch: str = "resnet8_narrow"
    """The network of both, as train/pretrain.py names it."""


def pretrain_config(config: RivalConfig) -> PretrainConfig:
    """The one recipe: the CIFAR-10 demo's with a warm-up and a wider projector.

    Its rate of the weights, 0.4, was better than 1.0 in 8 epochs of ours on a fifth of CIFAR-10: kNN 41.1 against 40.0.
    """
    return replace(
        PRESETS["cifar10-demo"],
        data=config.data,
        epochs=config.epochs,
        warmup_epochs=config.epochs // 10,
        seed=config.seed,
        resolution=config.resolution,
        arch=config.arch,
        amp="bf16",
        projector="512-512",
    )


def recipe_and_images(config: RivalConfig) -> dict[str, Any]:
    """What a run shares with the one that it continues, and, but for the seed, with the others in its folder."""
    images = dataset_sha256(open_stored(train_beton(config.data)))
    return recipe(as_plain(pretrain_config(config))) | {"images_sha256": images}


# ---- both sides ----


class Ours:
    """The trainer's update and loader."""

    def __init__(self, config: PretrainConfig):
        ranks = start_ranks()
        views = tuple(replace(view, interpolation="bilinear") for view in CIFAR_VIEWS)
        self.loader = make_loader(replace(loader_config(config, ranks), views=views))
        self.update = make_update(config, ranks, steps_per_epoch=len(self.loader), ids=self.loader.ids)
        self.backbone, self.parts = self.update.method.backbone, self.update.state

    def train(self, epoch: int) -> float:
        """Trains an epoch; the mean loss."""
        losses = []
        for batch in self.loader.epoch(epoch):
            metrics = self.update(batch.views, batch.step)
            assert metrics is not None, "--on-nan stop leaves no update out"
            losses.append(metrics["loss"])
        return torch.stack(losses).mean().item()


@torch.no_grad()
def knn_top1(backbone: nn.Module, features: int, config: PretrainConfig) -> float:
    """Top-1 in percent of the validation images by the 20 nearest of all training images, as eval/knn.py has it."""
    encoder = Encoder("trained", backbone.eval(), backbone_info(config, features, 0), "cpu")
    found: list[torch.Tensor] = []
    for split in ("train", "val"):
        loading = centre_loader_config(encoder, config.data / f"{split}.beton", None, "fast", 0)
        found += [extract_features(encoder, loading, torch.float32), torch.from_numpy(open_stored(loading.data).labels)]
    backbone.train()
    classes = int(found[1].max()) + 1
    k = min(KNN_HEADLINE, len(found[1]))
    return knn_accuracy(*found, classes, neighbours=(k,))[k].top1


# ---- a run ----


def made_sides(chosen: PretrainConfig, images: Path) -> tuple[Ours, Theirs, dict[str, float]]:
    """Both sides as they begin, and the seconds that each took to start. Raises UserError."""
    if not find_spec("lightly"):
        raise UserError("lightly is not installed; `pip install lightly`, or `pip install -e .[test]`, and run again")
    times = [time.perf_counter()]
    ours = Ours(chosen)
    times.append(time.perf_counter())
    theirs = Theirs(ours.update, images)
    times.append(time.perf_counter())
    if (own := ours.loader.images) != theirs.images:
        raise UserError(
            f"--data {chosen.data} has {own} images, --images {images} {theirs.images}; convert these again"
        )
    return ours, theirs, dict(zip(SIDES, np.diff(times).tolist(), strict=True))


def run(config: RivalConfig, state: Path) -> dict[str, Any]:
    """Trains both from where `state` stands to the end, and returns the record. Raises UserError."""
    chosen = pretrain_config(config)
    ours, theirs, start_s = made_sides(chosen, config.images)
    sides: dict[str, Ours | Theirs] = {"ours": ours, "theirs": theirs}
    record: dict[str, Any] = {"recipe": recipe_and_images(config), "start_s": start_s}
    record |= {part: {name: [] for name in SIDES} for part in ("seconds", "loss", "knn")}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        require_same_recipe(record["recipe"], saved["record"], state)
        record = saved["record"]
        for name, side in sides.items():
            for part, content in saved[name].items():
                side.parts[part].load_state_dict(content)

    def measure(epoch: int) -> None:
        for name, side in sides.items():
            record["knn"][name].append([epoch, knn_top1(side.backbone, ours.update.features, chosen)])

    if not record["knn"]["ours"]:
        measure(0)
    for epoch in range(len(record["seconds"]["ours"]), config.epochs):
        for name, side in sides.items():
            start = time.perf_counter()
            record["loss"][name].append(side.train(epoch))
            record["seconds"][name].append(time.perf_counter() - start)
        if (epoch + 1) % KNN_EVERY == 0 or epoch + 1 == config.epochs:
            measure(epoch + 1)
        states = {name: {part: x.state_dict() for part, x in side.parts.items()} for name, side in sides.items()}
        with whole_file(state) as file:
            torch.save({"record": record} | states, file)
        last = ((name, *(record[part][name][-1] for part in ("seconds", "loss", "knn"))) for name in SIDES)
        texts = (f"{name} {s:.1f} s, loss {loss:.2f}, kNN {knn[1]:.2f} % at {knn[0]}" for name, s, loss, knn in last)
        say_line(f"epoch {epoch + 1}: {'; '.join(texts)}")
    ours.loader.close()
    return record


def require_same_recipe(wanted: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Raises UserError where the record in a file is of another recipe; seeds may differ."""
    if differ := sorted(name for name in wanted if name != "seed" and wanted[name] != record["recipe"].get(name)):
        raise UserError(f"{path} is of a run with another {', '.join(differ)}; give the same flags or another --out")


def finished(config: RivalConfig) -> dict[int, dict[str, Any]]:
    """The records in --out by seed. Raises UserError for one of another recipe."""
    records = {}
    for path in config.out.glob("seed-*.json"):
        record = json.loads(path.read_text())
        require_same_recipe(recipe_and_images(config), record, path)
        records[record["recipe"]["seed"]] = record
    return dict(sorted(records.items()))


def main(config: RivalConfig) -> None:
    """Runs or continues one seed, then tells of all that are done."""
    if config.epochs < 1:
        raise UserError(f"--epochs {config.epochs} was given, at least 1 is expected")
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"seed-{config.seed}.json"
    if config.seed not in finished(config):
        record = run(config, path.with_suffix(".pt"))
        packages = machine("torch", "torchvision", "lightly", "pillow", "numba")
        about = {
            "machine": packages,
            "torch_threads": torch.get_num_threads(),
            "environment": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
            "command": shlex.join(["python", *sys.argv]),
        }
        write_json(path, about | {"summary": summary(record)} | record)
    records = finished(config)
    write_whole(config.out / "table.md", table(records))
    draw(records, config.out / "curves.png")
    print(table(records), end="")


if __name__ == "__main__":
    run_command(RivalConfig, main)

"""Barlow Twins by this project and by lightly's own parts, an epoch of each in turn: what accuracy, in what time?

    python scripts/bench/rival.py --data data/cifar10 --images data/cifar10/source --out results/rival/cifar10
    python scripts/bench/rival.py --data data/imagenette --images DIR --resolution 64 --out results/rival/imagenette

    ours    train/update.py's update and the default loader, as the trainer runs them
    theirs  lightly's BarlowTwinsLoss, LARS and BYOLTransform around torchvision's images and PyTorch's DataLoader, with
            a process a core that stays between epochs; a pass a view, as lightly's example has it
            (examples/pytorch/barlowtwins.py; optimizer and transform: benchmarks/imagenet/resnet50/barlowtwins.py)

Both have the same initial weights, recipe (`recipe`, below), schedule, autocast, memory format, cores and views: crop,
flip, jitter, grey, solarize. Ours crops bilinearly here, as lightly does, so that the views have one distribution; the
loss is float32 outside the autocast on both sides. The draws differ, and LARS's denominator: ‖g + wd · p‖ is ours,
‖g‖ + wd · ‖p‖ lightly's. Nothing of one side runs while the other is timed. What is not timed: imports, checkpoints,
and the nearest-neighbour accuracy, that of eval/knn.py with all training images. Timed are both sides' starts.

After each pair of epochs the states of both are written, and the same command continues there (ours with the same
bits, lightly's with other draws). At its end a run leaves seed-N.json, and a table and a picture of all seeds there.
"""

import copy
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measure import machine, write_json
from PIL import Image
from rival_table import SIDES, draw, summary, table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from eval.features import Encoder, centre_loader_config, extract_features
from eval.metrics import knn_accuracy
from pipeline.command import DATA, run_command
from pipeline.disk import whole_file, write_whole
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.progress import say_line
from pipeline.spec import CIFAR_VIEWS
from pipeline.storage.shards import open_stored
from pipeline.storage.sources.open import open_source
from train.cards import PRESETS
from train.config import AMP, NORMALIZATIONS, PretrainConfig, as_plain, recipe
from train.distributed import start_ranks
from train.knn_vote import KNN_HEADLINE
from train.run_data import loader_config
from train.runstate import backbone_info
from train.update import lr_share, make_update

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
    amp: Literal["bf16", "off"] = "bf16"
    """Autocast of both."""


def pretrain_config(config: RivalConfig) -> PretrainConfig:
    """The one recipe: the CIFAR-10 demo's with a warm-up and a wider projector. Chosen by short runs of ours."""
    return replace(
        PRESETS["cifar10-demo"],
        data=config.data,
        epochs=config.epochs,
        warmup_epochs=config.epochs // 10,
        seed=config.seed,
        resolution=config.resolution,
        arch=config.arch,
        amp=config.amp,
        projector="512-512",
    )


# ---- both sides ----


class Ours:
    """The trainer's update and loader."""

    def __init__(self, config: PretrainConfig):
        self.ranks = start_ranks()
        loading = loader_config(config, self.ranks)
        views = tuple(replace(view, interpolation="bilinear") for view in CIFAR_VIEWS)
        self.loader = make_loader(replace(loading, views=views))
        self.update = make_update(config, self.ranks, steps_per_epoch=len(self.loader), ids=self.loader.ids)
        self.backbone = self.update.method.backbone

    def train(self, epoch: int) -> float:
        losses = []
        for batch in self.loader.epoch(epoch):
            metrics = self.update(batch.views, batch.step)
            assert metrics is not None, "--on-nan stop leaves no update out"
            losses.append(metrics["loss"])
        return torch.stack(losses).mean().item()

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.update.state.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in self.update.state.items():
            part.load_state_dict(state[name])


class Pixels(Dataset):
    """Images in memory, as torchvision's CIFAR10 keeps them: (N, H, W, 3) uint8, made Pillow's when asked for."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform):
        self.pixels, self.labels, self.transform = pixels, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def training_images(images: Path, transform) -> Any:
    """torchvision's dataset of the training images, or one like it. Raises UserError where there are none."""
    from torchvision.datasets import ImageFolder

    source = open_source(images, "train")
    if source.pixels is None:
        return ImageFolder(source.where, transform)
    return Pixels(source.pixels, source.labels, transform)


class Theirs:
    """lightly's parts around a copy of our network as it begins."""

    def __init__(self, config: PretrainConfig, images: Path, ours: Ours):
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.utils import get_weight_decay_parameters
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
        from lightly.utils.lars import LARS

        normalize = NORMALIZATIONS[config.views]
        view: dict[str, Any] = {"input_size": config.resolution, "gaussian_blur": 0.0}
        view["normalize"] = {"mean": list(normalize.mean), "std": list(normalize.std)}
        dataset = training_images(images, BYOLTransform(BYOLView1Transform(**view), BYOLView2Transform(**view)))
        cores = len(os.sched_getaffinity(0))
        self.loader = DataLoader(
            dataset, config.global_batch, shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True
        )
        self.config, self.device, self.images = config, ours.ranks.device, len(dataset)
        self.backbone, self.projector = copy.deepcopy((ours.backbone, ours.update.method.projector))
        self.network = nn.Sequential(self.backbone, self.projector)
        self.criterion = BarlowTwinsLoss(lambda_param=config.lambd)
        weights, others = get_weight_decay_parameters([self.network])
        rates = [group["peak_lr"] for group in ours.update.optimizer.param_groups]
        groups = [{"params": weights, "lr": rates[0]}, {"params": others, "lr": rates[1], "weight_decay": 0.0}]
        self.optimizer = LARS(
            groups, lr=rates[0], momentum=0.9, weight_decay=config.weight_decay, trust_coefficient=config.lars_eta
        )
        warmup, steps = (epochs * len(self.loader) for epochs in (config.warmup_epochs, config.epochs))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_share(step, warmup, steps))

    def train(self, epoch: int) -> float:
        torch.manual_seed(hash((self.config.seed, epoch)))  # the order of images, and the workers' draws at a start
        losses = []
        for views, _ in self.loader:
            loss = self.loss(views)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        """lightly's loss of two views (B, 3, H, W)."""
        views = [view.to(self.device, memory_format=torch.channels_last) for view in views]
        with torch.autocast(self.device.type, AMP[self.config.amp], enabled=self.config.amp != "off"):
            one, other = (self.network(view) for view in views)
        return self.criterion(one.float(), other.float())

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "schedule")}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


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


def made_sides(config: RivalConfig) -> tuple[Ours, Theirs, dict[str, float]]:
    """Both sides as they begin, and how long each took to start, s, with what it alone imports. Raises UserError."""
    if not find_spec("lightly"):
        raise UserError("lightly is not installed; `pip install lightly`, or `pip install -e .[test]`, and run again")
    chosen, started = pretrain_config(config), time.perf_counter()
    ours = Ours(chosen)
    ours_s, started = time.perf_counter() - started, time.perf_counter()
    theirs = Theirs(chosen, config.images, ours)
    start_s = {"ours": ours_s, "theirs": time.perf_counter() - started}
    if (own := ours.loader.images) != (other := theirs.images):
        raise UserError(f"--data {config.data} has {own} images, --images {config.images} {other}; convert these again")
    return ours, theirs, start_s


def run(config: RivalConfig, state: Path) -> dict[str, Any]:
    """Trains both from where `state` stands to the end, and returns the record. Raises UserError."""
    ours, theirs, start_s = made_sides(config)
    sides: dict[str, Ours | Theirs] = {"ours": ours, "theirs": theirs}
    chosen = ours.update.config
    record: dict[str, Any] = {"recipe": recipe(as_plain(chosen)), "start_s": start_s}
    record |= {part: {name: [] for name in SIDES} for part in ("seconds", "loss", "knn")}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["record"]["recipe"] != record["recipe"]:
            raise UserError(f"{state} is of a run with other flags; give the same ones, or another --out")
        record = saved["record"]
        for name, side in sides.items():
            side.load(saved[name])

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
        with whole_file(state) as file:
            torch.save({"record": record} | {name: side.state() for name, side in sides.items()}, file)
        last = {name: [record[part][name][-1] for part in ("seconds", "loss", "knn")] for name in SIDES}
        texts = [
            f"{name} {s:.1f} s, loss {loss:.2f}, kNN {knn[1]:.2f} % at {knn[0]}"
            for name, (s, loss, knn) in last.items()
        ]
        say_line(f"epoch {epoch + 1}: {'; '.join(texts)}")
    ours.loader.close()
    return record


def main(config: RivalConfig) -> None:
    """Runs or continues one seed, then tells of all that are done."""
    config.out.mkdir(parents=True, exist_ok=True)
    kept = config.out / f"seed-{config.seed}.json"
    if not kept.exists():
        record = run(config, kept.with_suffix(".pt"))
        about = {
            "machine": machine("torch", "torchvision", "lightly", "pillow", "numba"),
            "command": shlex.join(sys.argv),
        }
        write_json(kept, about | {"summary": summary(record)} | record)
    records = {int(path.stem[5:]): json.loads(path.read_text()) for path in sorted(config.out.glob("seed-*.json"))}
    write_whole(config.out / "table.md", table(records))
    draw(records, config.out / "curves.png")
    print(table(records), end="")


if __name__ == "__main__":
    run_command(RivalConfig, main)

"""Barlow Twins as a user of lightly writes it: the other side of rival.py.

Its loss, optimizer and transform (benchmarks/imagenet/resnet50/barlowtwins.py of lightly), torchvision's images and
PyTorch's DataLoader with a process a core, one pass through the network a view (examples/pytorch/barlowtwins.py there).
"""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline.storage.sources.open import open_source
from train.config import AMP, NORMALIZATIONS, PretrainConfig
from train.update import Update, lr_share


def training_images(images: Path, transform) -> Any:
    """torchvision's dataset of the training images, or one like it. Raises UserError where there are none."""
    from torchvision.datasets import ImageFolder

    source = open_source(images, "train")
    if source.pixels is None:
        return ImageFolder(source.where, transform)
    return Pixels(source.pixels, source.labels, transform)


class Pixels(Dataset):
    """Images in memory, as torchvision's CIFAR10 keeps them: (N, H, W, 3) uint8, made Pillow's when asked for."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform):
        self.pixels, self.labels, self.transform = pixels, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Theirs:
    """lightly's parts around a copy of the network of `ours` as it begins, with the recipe of its config."""

    def __init__(self, ours: Update, images: Path):
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.utils import get_weight_decay_parameters
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
        from lightly.utils.lars import LARS

        config: PretrainConfig = ours.config
        normalize = NORMALIZATIONS[config.views]
        view: dict[str, Any] = {"input_size": config.resolution, "gaussian_blur": 0.0}
        view["normalize"] = {"mean": list(normalize.mean), "std": list(normalize.std)}
        dataset = training_images(images, BYOLTransform(BYOLView1Transform(**view), BYOLView2Transform(**view)))
        cores = len(os.sched_getaffinity(0))
        self.loader = DataLoader(
            dataset, config.global_batch, shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True
        )
        self.config, self.device, self.images = config, ours.ranks.device, len(dataset)
        self.network = nn.Sequential(*copy.deepcopy((ours.method.backbone, ours.method.projector)))
        self.backbone = self.network[0]
        self.criterion = BarlowTwinsLoss(lambda_param=config.lambd)
        weights, others = get_weight_decay_parameters([self.network])
        rates = [group["peak_lr"] for group in ours.optimizer.param_groups]
        groups = [{"params": weights, "lr": rates[0]}, {"params": others, "lr": rates[1], "weight_decay": 0.0}]
        self.optimizer = LARS(
            groups, lr=rates[0], momentum=0.9, weight_decay=config.weight_decay, trust_coefficient=config.lars_eta
        )
        warmup, steps = (epochs * len(self.loader) for epochs in (config.warmup_epochs, config.epochs))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_share(step, warmup, steps))
        self.parts = {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}

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

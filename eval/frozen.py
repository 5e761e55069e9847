"""The pooled maps of a frozen ResNet's five stages, and classifiers that normalize such maps.

Source: Goyal 2019 (fair_self_supervision_benchmark) and MMSelfSup's MultiPooling, type "specified". A map of another
size is pooled adaptively to the same grid, or left as it is where it is smaller.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from eval.features import Encoder
from eval.supervised import Heads, make_head
from pipeline.errors import UserError


class Pool(NamedTuple):
    """Average pooling of one stage: the map's side at 224 px, window, stride, padding and what comes out, all px."""

    side: int
    window: int
    stride: int
    padding: int
    grid: int


POOLS = {
    "feature1": Pool(112, 10, 10, 4, 12),  # the stem; ResNet-50's dimensions: 64 · 144 = 9216
    "feature2": Pool(56, 16, 8, 0, 6),  # layer1: 256 · 36 = 9216
    "feature3": Pool(28, 13, 5, 0, 4),  # layer2: 512 · 16 = 8192
    "feature4": Pool(14, 8, 3, 0, 3),  # layer3: 1024 · 9 = 9216
    "feature5": Pool(7, 6, 1, 0, 2),  # layer4: 2048 · 4 = 8192
}


def pool_map(pool: Pool, features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, C, grid, grid)."""
    if features.shape[-2:] == (pool.side, pool.side):
        return F.avg_pool2d(features, pool.window, pool.stride, pool.padding)
    height, width = features.shape[-2:]
    return F.adaptive_avg_pool2d(features, (min(pool.grid, height), min(pool.grid, width)))


def resnet_stages(backbone: nn.Module) -> list[nn.Module]:
    """The last module of the stem and the four stages of a ResNet of torchvision or timm; fewer of another network."""
    stem = getattr(backbone, "relu", None) or getattr(backbone, "act1", None)
    found = [stem, *(getattr(backbone, f"layer{i}", None) for i in (1, 2, 3, 4))]
    return [stage for stage in found if stage is not None]


def is_resnet(backbone: nn.Module) -> bool:
    """Whether it has a ResNet's four stages, which heads.py and detection.py evaluate."""
    return len(resnet_stages(backbone)) == len(POOLS)


class StageFeatures(nn.Module):
    """A ResNet of torchvision or timm as (B, 3, H, W) → {"feature1": pooled map (B, C, h, w), … "feature5"}.

    Each map is pooled as it arises, so that the large ones are not kept. `published` tells after a pass whether all
    maps had the sides of a ResNet at 224 px. Raises UserError for another kind of network.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        stages = resnet_stages(backbone)
        if len(stages) < len(POOLS):
            raise UserError(
                f"{type(backbone).__name__} has no stem and four stages as a ResNet has; "
                "evaluate it with eval/linear.py or eval/knn.py"
            )
        self.backbone, self.published = backbone, True
        self.maps: dict[str, torch.Tensor] = {}
        for (name, pool), stage in zip(POOLS.items(), stages, strict=True):
            stage.register_forward_hook(self._keep(name, pool))

    def _keep(self, name: str, pool: Pool) -> Callable:
        def hook(module, inputs, output):
            self.published &= output.shape[-1] == pool.side
            self.maps[name] = pool_map(pool, output)

        return hook

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.published = True
        self.backbone(images)
        maps, self.maps = self.maps, {}
        return maps


class NormalizedHeads(Heads):
    """A batch norm per channel and a linear classifier for each of several maps: {name: (B, C, h, w)} → {name: (B, K)}.

    `shapes` are the maps' (C, h, w) by name; without `affine` the batch norm has no weights.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], classes: int, seed: int, *, affine: bool):
        super().__init__({name: make_head(math.prod(shape), classes, seed) for name, shape in shapes.items()})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(shape[0], affine=affine) for name, shape in shapes.items()})

    def forward(self, maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: head(self.norms[name](maps[name]).flatten(1)) for name, head in self.heads.items()}


@torch.no_grad()
def map_shapes(extract: nn.Module, encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """The (C, h, w) of each map that `extract` makes of the encoder's views."""
    side = encoder.info.resolution_px
    maps = extract(torch.zeros(1, 3, side, side, device=encoder.device))
    return {name: tuple(made.shape[1:]) for name, made in maps.items()}

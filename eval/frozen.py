"""The pooled maps of a frozen ResNet's five stages, and classifiers that normalize such maps.

Source: Goyal 2019 (fair_self_supervision_benchmark); VISSL's LINEAR_EVAL_FEAT_POOL_OPS_MAP, whose conv1 (behind its
ReLU), res2, … res5 are the five; MMSelfSup's MultiPooling, type "specified". A map of another size is pooled adaptively
to the same grid, or left as it is where it is smaller.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from eval.features import Encoder
from eval.subject import Subject, SubjectConfig
from eval.supervised import Epoch, Group, Heads, fit_on_crops, inputs_of, make_head, validate
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
OUTPUT = "output"  # the network's own features: of a ResNet the average of its last map, which VISSL calls res5avg
Stage = Literal["feature1", "feature2", "feature3", "feature4", "feature5", "output"]


@dataclass(frozen=True)
class StagesConfig(SubjectConfig):
    """The flags of evaluations of stages."""

    stages: tuple[Stage, ...] = ()
    """Which features: the pooled maps of a ResNet's stem and stages (VISSL's conv1, res2 … res5), or its own output.
    Several are evaluated one by one, and the first has the headline. None given: feature5, as published; output where
    the network has no stages."""


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


def chosen_stages(config: StagesConfig, encoder: Encoder) -> tuple[str, ...]:
    """What --stages names, without repetitions, or the default; says so where the network has no stages."""
    if config.stages:
        return tuple(dict.fromkeys(config.stages))
    if is_resnet(encoder.module):
        return ("feature5",)
    print(
        f"note: {encoder.info.arch} has no stages as a ResNet has; in place of the published pooled maps its own "
        "output is evaluated, a modified protocol",
        file=sys.stderr,
    )
    return (OUTPUT,)


class StageFeatures(nn.Module):
    """A network as (B, 3, H, W) → {"feature1": pooled map (B, C, h, w), …} of `stages`, "output" as (B, D, 1, 1).

    Each map is pooled as it arises, so that the large ones are not kept. `published` tells after a pass whether all
    maps had the sides of a ResNet at 224 px. Raises UserError for stages of what is no ResNet of torchvision or timm.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[str, ...] = tuple(POOLS)):
        super().__init__()
        if not is_resnet(backbone) and stages != (OUTPUT,):
            raise UserError(
                f"{type(backbone).__name__} has no stem and four stages as a ResNet has; "
                "evaluate its output, by eval/linear.py, eval/knn.py, or eval/svm.py or transfer.py --stages output"
            )
        self.backbone, self.stages, self.published = backbone, stages, True
        self.maps: dict[str, torch.Tensor] = {}

    def _keep(self, name: str, pool: Pool) -> Callable:
        def hook(module, inputs, output):
            self.published &= output.shape[-1] == pool.side
            self.maps[name] = pool_map(pool, output)

        return hook

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.published = True
        # Hooks for this pass alone: another StageFeatures of the same network has its own.
        stages = zip(POOLS.items(), resnet_stages(self.backbone), strict=False)
        hooks = [stage.register_forward_hook(self._keep(*pool)) for pool, stage in stages if pool[0] in self.stages]
        try:
            self.maps[OUTPUT] = self.backbone(images)[:, :, None, None]
        finally:
            for hook in hooks:
                hook.remove()
        maps, self.maps = self.maps, {}
        return {name: maps[name] for name in self.stages}


class FlatStage(nn.Module):
    """One stage as an Encoder's module: (B, 3, H, W) → (B, C · h · w)."""

    def __init__(self, extract: StageFeatures):
        super().__init__()
        self.extract = extract

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (made,) = self.extract(images).values()
        return made.flatten(1)


def stage_encoder(encoder: Encoder, stage: str) -> Encoder:
    """The encoder whose features are one stage's pooled map, (B, C · h · w); of "output" the encoder itself."""
    if stage == OUTPUT:
        return encoder
    extract = StageFeatures(encoder.module, (stage,)).eval()
    info = replace(encoder.info, features=math.prod(map_shapes(extract, encoder)[stage]))
    return replace(encoder, module=FlatStage(extract), info=info, stage=stage)


def stage_settings(extract: StageFeatures) -> dict[str, str]:
    """What a result's settings say, after a pass: the headline's stage, and how the maps were pooled."""
    return {"stage": extract.stages[0], "pooling": "as published" if extract.published else "adaptive"}


def torch_head(features: int, classes: int, seed: int) -> nn.Linear:
    """A linear classifier with torch's own initial weights, the same for a seed wherever it runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(features, classes)


class NormalizedHeads(Heads):
    """A batch norm per channel and a linear classifier for each of several maps: {name: (B, C, h, w)} → {name: (B, K)}.

    `shapes` are the maps' (C, h, w) by name. With `affine` VISSL's eval_mlp: the batch norm has weights, the classifier
    starts as torch's (vissl/models/heads/linear_eval_mlp.py and mlp.py); without it MMSelfSup's, which starts as
    make_head's.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], classes: int, seed: int, *, affine: bool):
        make = torch_head if affine else make_head
        super().__init__({name: make(math.prod(shape), classes, seed) for name, shape in shapes.items()})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(shape[0], affine=affine) for name, shape in shapes.items()})

    def forward(self, maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: head(self.norms[name](maps[name]).flatten(1)) for name, head in self.heads.items()}


@torch.no_grad()
def map_shapes(extract: nn.Module, encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """The (C, h, w) of each map that `extract` makes of the encoder's views."""
    side = encoder.info.resolution_px
    maps = extract(torch.zeros(1, 3, side, side, device=encoder.device))
    return {name: tuple(made.shape[1:]) for name, made in maps.items()}


def train_heads(
    subject: Subject,
    heads: NormalizedHeads,
    groups: list[Group],
    *,
    settings: dict,
    extract: StageFeatures,
    validate_every: int,
) -> list[Epoch]:
    """Classifiers of maps on new crops each epoch, all on one pass of the encoder; validated on the centre views."""
    labels = subject.val_labels()
    with subject.val_loader() as val:
        return fit_on_crops(
            subject,
            heads,
            groups,
            settings=settings,
            extract=extract,
            validation=lambda: validate(heads, inputs_of(val.batches(), extract, labels)),
            nesterov=True,
            validate_every=validate_every,
        )
